"""Randomness of samples: a stream for each of them, so that a sample does not depend on those beside it.

**Guarantees**: sample i of a seed starts from the same noise, and is given the same noise at each step, whichever
batch it is in, however many samples there are and wherever they run: streams are drawn on the CPU. What the model then
makes of it differs by rounding where another batch size takes another matrix kernel.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Streams:
    """Standard normal numbers for some samples.

    Args:
        seed: Of all samples.
        numbers: Of those that are drawn here.
        device: Where the numbers go.
        dtype: As which they are drawn and handed out.
    """

    def __init__(self, seed: int, numbers: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> None:
        self._generators = [torch.Generator().manual_seed(_seed_of(seed, number)) for number in numbers]
        self._device, self._dtype = device, dtype

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return the next numbers of each stream, (N, *shape)."""
        drawn = torch.empty(len(self._generators), *shape, dtype=self._dtype)
        for row, generator in zip(drawn, self._generators, strict=True):
            row.normal_(generator=generator)
        return drawn.to(self._device)


def _seed_of(seed: int, number: int) -> int:
    """Return the seed of one sample's stream; a sum would give seed 0's sample 1 to seed 1's sample 0."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1
