"""Which units are in a step: Poisson sampling, which the accountant knows, and fixed batches, which it does not.

Randomness is expanded by SHAKE-128 (FIPS 202) from a key that comes from the operating system: the same key gives the
same samples on every rank, and without it they cannot be told from uniform bits. Amplification by sampling holds only
while a sample is secret, so a key and a position in its stream are never saved, and a resumed run draws another key.
"""

import hashlib
import math
import secrets
from abc import ABC, abstractmethod
from typing import ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from dit_dp import validate
from dit_dp.errors import UsageError

KEY_SIZE = 32
"""Bytes of entropy that a sampler takes."""

Index = np.ndarray[tuple[int], np.dtype[np.int64]]

_CHUNK = 1 << 20  # units whose bits are in memory at a time
_BITS, _REST = 16, 64  # bits drawn for every unit, and further ones where those do not decide


class Sampler(ABC):
    """What draws each step's units; every rank calls `draw` once a step, in the same order.

    Args:
        num_units: Units in the data set, N >= 1.
        entropy: `KEY_SIZE` uniform random bytes; default: the operating system's. Several ranks need the same ones,
            from `Ranks.entropy(KEY_SIZE)`. Given otherwise only by tests, since a run that repeats is not private.

    Attributes:
        accounting: The sampling that an accountant may assume, or `None`: no epsilon may be claimed.
        expected_batch_size: What the noised sum is divided by.
    """

    accounting: ClassVar[str | None] = None
    expected_batch_size: float

    def __init__(self, num_units: int, *, entropy: bytes | None = None) -> None:
        validate.integer("num_units", num_units, fix="the data set is empty" if num_units == 0 else None)
        self.num_units = num_units
        key = secrets.token_bytes(KEY_SIZE) if entropy is None else entropy
        if len(key) != KEY_SIZE:
            raise UsageError.for_value("entropy", f"{len(key)} bytes", f"{KEY_SIZE} random bytes")
        self._key = key
        self._num_drawn = 0

    def draw(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """Return this rank's share of the next sample.

        Args:
            rank: 0 ... world_size - 1.
            world_size: Ranks that draw from the same entropy. A unit of the sample is on one of them, so their shares
                together are the sample that one rank alone would draw; a share may be empty.

        Returns:
            (K,) int64 on CPU, ascending for Poisson sampling; K may be 0.
        """
        validate.integer("world_size", world_size)
        validate.integer("rank", rank, minimum=0)
        if rank >= world_size:
            raise UsageError.for_value("rank", rank, f"0 to {world_size - 1}")
        index = self._draw()
        self._num_drawn += 1
        return torch.from_numpy(np.ascontiguousarray(index[rank::world_size]))

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or saved: a repeated sample under fresh noise is not what is accounted for."""
        raise TypeError(f"{type(self).__name__} is never saved or copied; make a new one, which draws fresh entropy")

    @abstractmethod
    def _draw(self) -> Index:
        """Return the sample of all ranks."""

    def _stream(self, *place: int, size: int) -> bytes:
        """Return random bytes that belong to a place, such as a draw and a chunk; no two places share any."""
        name = b"".join(number.to_bytes(8, "little") for number in place)
        return hashlib.shake_128(self._key + name).digest(size)


class PoissonSampler(Sampler):
    """Every unit is in every sample with probability q, independently of all others and of other samples.

    Args:
        num_units: N >= 1.
        sample_rate: q in (0, 1].
        entropy: As for `Sampler`.

    Raises:
        UsageError: A value is out of range.

    **Guarantees**: this is Poisson sampling itself, not an equivalent of it. With ``t = floor(2^80 q)``, a unit is in
    the sample when a uniform integer of 80 bits of its own is below t. Its first 16 bits are drawn for every unit and
    decide unless they equal the first bits of t; only then (one unit in 65536) are the other 64 drawn. All in integers:
    there is no float to round, no gap between units to truncate, and no count whose distribution is approximated. The
    probability is t / 2^80, never above q and below it by less than 2^-80, so that epsilon at rate q is a bound. That
    the bits are uniform and independent is the assumption that SHAKE-128 under a random key cannot be told from such.
    Shares over ranks split one sample, so the sample over all ranks is Poisson at rate q.
    **Edge cases**: q = 1 takes everybody, without drawing; q below 2^-80 takes nobody; a sample or share may be empty,
    and noise has to be released all the same. The time is linear in N, and memory is what a million units take (2 MB)
    and the sample; neither depends on the number of samples drawn.
    """

    accounting: ClassVar[str | None] = "poisson"

    def __init__(self, num_units: int, sample_rate: float, *, entropy: bytes | None = None) -> None:
        super().__init__(num_units, entropy=entropy)
        validate.real("sample_rate", sample_rate, positive=True)
        if sample_rate > 1:
            raise UsageError.for_value("sample_rate", sample_rate, "a number > 0 and <= 1")
        self.sample_rate = float(sample_rate)
        self.expected_batch_size = self.sample_rate * num_units
        threshold = int(math.ldexp(self.sample_rate, _BITS + _REST))  # exact: a float times a power of two
        self._first, self._second = threshold >> _REST, threshold % (1 << _REST)

    def _draw(self) -> Index:
        if self._first == 1 << _BITS:
            return np.arange(self.num_units)
        starts = range(0, self.num_units, _CHUNK)
        return np.concatenate([start + self._draw_chunk(start) for start in starts])

    def _draw_chunk(self, start: int) -> Index:
        """Return who of up to `_CHUNK` units is in the sample, counted from the first of them."""
        count = min(_CHUNK, self.num_units - start)
        bits = np.frombuffer(self._stream(self._num_drawn, start, 0, size=2 * count), dtype="<u2")
        chosen, undecided = bits < self._first, np.flatnonzero(bits == self._first)
        rest = self._stream(self._num_drawn, start, 1, size=8 * len(undecided))
        chosen[undecided] = np.frombuffer(rest, dtype="<u8") < np.uint64(self._second)
        return np.flatnonzero(chosen)


class ShuffledSampler(Sampler):
    """Fixed batches of a permutation of the units, a new one each epoch; **no epsilon may be claimed for them**.

    Whoever is in one batch of an epoch is in no other, so units are not sampled independently, and the bound of Poisson
    sampling does not hold (Chua et al., arXiv 2403.17673, show how far off it is). `accounting` is `None`.

    Args:
        num_units: N >= 1.
        batch_size: Units a step, 1 <= B <= N. The N mod B last units of a permutation are left out of that epoch.
        entropy: As for `Sampler`.
    """

    def __init__(self, num_units: int, batch_size: int, *, entropy: bytes | None = None) -> None:
        super().__init__(num_units, entropy=entropy)
        validate.integer("batch_size", batch_size)
        if batch_size > num_units:
            raise UsageError.for_value("batch_size", batch_size, f"at most {num_units}, the size of the data set")
        self.batch_size = batch_size
        self.expected_batch_size = float(batch_size)
        self._order = np.arange(0)

    def _draw(self) -> Index:
        epoch, batch = divmod(self._num_drawn, self.num_units // self.batch_size)
        if batch == 0:
            seed = int.from_bytes(self._stream(epoch, size=KEY_SIZE), "little")
            self._order = np.random.default_rng(seed).permutation(self.num_units)
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
