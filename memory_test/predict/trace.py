"""The log of a step that is only imagined: which storages are born and die, in which order, and what is computed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Rule = Callable[..., int]
"""Bytes of a temporary from integers, such as its operation's sizes."""


@dataclass(frozen=True)
class Temporary:
    """Memory that an operation takes inside, which no tensor shows.

    Attributes:
        rule, numbers: Its bytes are ``rule(*numbers)``; kept apart, since bytes need not be affine in the batch.
        before: Whether it is taken before the operation's results.
        last: Number, among those taken after the results, of the last one that it lives to see; `None`: lives until
            the operation ends.
        stays: Whether it is kept, as a library's workspace is.
    """

    rule: Rule
    numbers: tuple[int, ...]
    before: bool = False
    stays: bool = False
    last: int | None = None


Temporaries = Callable[[str, Sequence[Any], bool], list[Temporary]]
"""From an operation's name and arguments, and whether it runs in a backward, to what it takes inside."""


@dataclass(frozen=True)
class Storage:
    """What was born.

    Attributes:
        num_bytes: Its size.
        scope: Whether it was made for norms or Gram matrices.
        temporary: The rule of its size, if it is one.
    """

    num_bytes: int
    scope: bool
    temporary: Temporary | None = None


@dataclass(frozen=True)
class Operation:
    """One operation on the device.

    Attributes:
        name: In ATen, without the overload.
        flops: By `torch.utils.flop_counter`'s formulas.
        num_bytes: Read and written: operands and results once each.
        dtype: Of the first result.
        count: How many like it there are: of a loop's rounds that are alike, one is traced.
    """

    name: str
    flops: int
    num_bytes: int
    dtype: torch.dtype
    count: int = 1


@dataclass
class Trace:
    """A run of operations.

    Attributes:
        storages: In order of birth.
        events: Index of a storage, at its birth and again at its death.
        operations: In order.
        event_operations: By event: how many operations had begun.
    """

    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    event_operations: list[int] = field(default_factory=list)

    def add(self, event: int) -> None:
        """Append an event."""
        self.events.append(event)
        self.event_operations.append(len(self.operations))

    def drop_last(self) -> None:
        """Undo the last event, the birth of the last storage."""
        self.storages.pop()
        self.events.pop()
        self.event_operations.pop()

    def order_deaths(self, borders: Iterable[int]) -> None:
        """Put storages that die at one instant in order of birth: which goes first is chance, and differs by run.

        Args:
            borders: Positions of events that instants do not reach across.
        """
        edges, seen, first = set(borders), set[int](), 0
        for position, (index, instant) in enumerate(zip(self.events, self.event_operations, strict=True)):
            born = index not in seen
            if born or position in edges or instant != self.event_operations[first]:
                self._order(first, position)
                first = position + 1 if born else position
            if born:
                seen.add(index)
        self._order(first, len(self.events))

    def _order(self, start: int, end: int) -> None:
        """Put the events of a range in order."""
        if end - start > 1:
            self.events[start:end] = sorted(self.events[start:end])
