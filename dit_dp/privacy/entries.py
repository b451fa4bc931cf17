"""What a ledger's file says: facts, charges, and the chain that holds its lines together. No file is touched here."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.privacy.accounting import ADJACENCY, SAMPLINGS, UNITS, Mechanism, Sampling, Unit

SCHEMA_VERSION = 1

TORN = b"\ttorn\t"
"""Between what was left of a line and its closing entry; JSON escapes tabs, so no line contains it."""

_KEY = b',"chain":"'


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What has to stay the same for a run to go on.

    Attributes:
        dataset: What tells one data set from another, such as a hash of it.
        num_units: N.
        unit: Whom the promise is made to: ``image`` or ``set``.
        sampling: ``poisson``, or ``shuffled``, for which no epsilon is claimed.
        noise_multiplier: sigma >= 0; 0 is no privacy.
        sample_rate: q in (0, 1]; for fixed batches B / N.
        adjacency: Which data sets are neighbours; there is one choice.
    """

    dataset: str
    num_units: int
    unit: Unit
    sampling: Sampling
    noise_multiplier: float
    sample_rate: float
    adjacency: str = ADJACENCY

    def __post_init__(self) -> None:
        validate.one_of("unit", self.unit, UNITS)
        validate.one_of("sampling", self.sampling, SAMPLINGS)
        validate.one_of("adjacency", self.adjacency, (ADJACENCY,))
        validate.integer("num_units", self.num_units)
        Mechanism(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, num_steps=0)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One release, that of a training step.

    Attributes:
        step: The optimizer's step, from 0; `None` for a line that was not finished. Not unique: a step that was lost
            and is taken again is charged again.
        noise_multiplier: sigma.
        sample_rate: q.
        expected_batch_size: The divisor.
        max_grad_norm: C.
        phase: Of training, for people.
    """

    step: int | None
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    max_grad_norm: float
    phase: str = ""

    def __post_init__(self) -> None:
        if self.step is not None:
            validate.integer("step", self.step, minimum=0)
            validate.real("expected_batch_size", self.expected_batch_size, positive=True)
            validate.real("max_grad_norm", self.max_grad_norm, positive=True)
        Mechanism(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, num_steps=1)


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in a ledger, for a checkpoint: how many charges were made, and the chain of the last line."""

    num_charges: int
    chain: str


@dataclass
class Content:
    """What a file says: facts, the chain of each line, how often each mechanism was charged, an unfinished line."""

    facts: Facts
    chains: list[str]
    counts: Counter[tuple[float, float]]
    num_torn: int = 0
    rest: bytes = b""

    def add(self, charge: Charge, chain: str, *, torn: bool) -> None:
        """Take note of a charge."""
        self.chains.append(chain)
        self.counts[charge.noise_multiplier, charge.sample_rate] += 1
        self.num_torn += torn


def line_of(payload: dict[str, Any], previous: str) -> bytes:
    """Return a line that continues a chain."""
    body = json.dumps(payload, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return body + _KEY + _digest(previous, body).encode() + b'"}\n'


def _digest(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()


def chain_of(line: bytes) -> str:
    """Return the chain at the end of a whole line."""
    return line.rpartition(_KEY)[2].rstrip(b'"}\n').decode("ascii", "replace")


def parse(path: Path, data: bytes) -> Content:
    """Return a file's content, every line of it checked.

    Raises:
        UsageError: A line was changed or is missing; the message names it.
    """
    *lines, rest = data.split(b"\n")
    if not lines:
        raise UsageError(f"ledger: {path} is not a ledger: it has no whole line")
    entries = _entries(path, lines)
    head, chain, _ = next(entries)
    version = head.pop("schema_version", None)
    if head.pop("kind", None) != "run" or version != SCHEMA_VERSION:
        raise _damaged(path, 1, f"it does not begin a ledger of version {SCHEMA_VERSION}")
    head.pop("run", None)
    content = Content(_build(Facts, head, path, 1), [chain], Counter(), rest=rest)
    for number, (entry, chain, unfinished) in enumerate(entries, 2):
        kind, sequence = entry.pop("kind", None), entry.pop("sequence", None)
        if sequence != number - 1 or kind != ("charge" if unfinished is None else "torn"):
            raise _damaged(path, number, f"it is entry {sequence}, a {kind}, where {number - 1} was to follow")
        if unfinished is not None and entry.pop("unfinished_sha256", None) != hashlib.sha256(unfinished).hexdigest():
            raise _damaged(path, number, "what it says of an unfinished line is not what stands there")
        content.add(_build(Charge, entry, path, number), chain, torn=unfinished is not None)
    return content


def _entries(path: Path, lines: list[bytes]) -> Iterator[tuple[dict[str, Any], str, bytes | None]]:
    """Yield each line's entry, its chain, and what stood there before if the line was once unfinished."""
    previous = ""
    for number, line in enumerate(lines, 1):
        unfinished, torn, text = line.rpartition(TORN)
        body, found, end = text.rpartition(_KEY)
        chain = _digest(previous, body)
        if not found or end != chain.encode() + b'"}':
            raise _damaged(path, number, "it was changed, or a line before it is missing")
        try:
            entry = json.loads(body + b"}")
        except ValueError:
            raise _damaged(path, number, "it is not JSON") from None
        yield entry, chain, unfinished if torn else None
        previous = chain


def _build(kind: Callable[..., Any], fields: dict[str, Any], path: Path, number: int) -> Any:
    """Return an entry's fields as the dataclass that they are."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise _damaged(path, number, str(error)) from None


def _damaged(path: Path, number: int, reason: str) -> UsageError:
    return UsageError(f"ledger: line {number} of {path} cannot be trusted: {reason}; bring back the file as it was")
