"""A run for any batch size, from two: what operations take is affine in the batch, event by event.

Reserved memory is not affine in the batch, but the size of each request is, and so are counted operations and bytes.
The sizes of temporaries follow rules of their own, whose arguments are affine. So two traced runs give the requests of
any other, which are replayed one by one.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from memory_test.predict.predict import Imagined
from memory_test.predict.trace import Operation, Storage, Trace

T = TypeVar("T")


@dataclass(frozen=True)
class AffineRun:
    """Two runs of one configuration that differ in the batch alone.

    Attributes:
        runs: Whose events are the same.
        batches: Their batch sizes, the smaller first.
    """

    runs: tuple[Imagined, Imagined]
    batches: tuple[int, int]

    @classmethod
    def of(cls, runs: tuple[Imagined, Imagined], batches: tuple[int, int]) -> "AffineRun | None":
        """Return the family that two runs span; `None` if something else than sizes depends on the batch."""
        one, two = runs
        alike = (
            one.trace.events == two.trace.events
            and one.trace.event_operations == two.trace.event_operations
            and one.places == two.places
            and one.tags == two.tags
        )
        return cls(runs, batches) if alike else None

    def at(self, batch: int) -> Imagined:
        """Return the run of a batch size."""
        one = self.runs[0]
        storages, which_storage = self._storages
        operations, which_operation = self._operations
        sized = [self._storage(a, b, batch) for a, b in storages]
        counted = [self._operation(a, b, batch) for a, b in operations]
        trace = Trace(
            [sized[number] for number in which_storage],
            one.trace.events,
            [counted[number] for number in which_operation],
            one.trace.event_operations,
        )
        return replace(one, trace=trace)

    @cached_property
    def _storages(self) -> tuple[list[tuple[Storage, Storage]], list[int]]:
        """Which pairs of storages there are, and the number of each one's."""
        return _distinct(*(run.trace.storages for run in self.runs))

    @cached_property
    def _operations(self) -> tuple[list[tuple[Operation, Operation]], list[int]]:
        """Which pairs of operations there are, and the number of each one's."""
        return _distinct(*(run.trace.operations for run in self.runs))

    def _between(self, one: int, two: int, batch: int) -> int:
        """Return the affine function's value, rounded up."""
        if one == two:
            return one
        first, second = self.batches
        return one + -((one - two) * (batch - first) // (second - first))

    def _storage(self, one: Storage, two: Storage, batch: int) -> Storage:
        if one.temporary is not None and two.temporary is not None:
            numbers = (one.temporary.numbers, two.temporary.numbers)
            between = tuple(self._between(a, b, batch) for a, b in zip(*numbers, strict=True))
            return replace(one, num_bytes=one.temporary.rule(*between))
        if one.num_bytes == two.num_bytes:
            return one
        return replace(one, num_bytes=max(0, self._between(one.num_bytes, two.num_bytes, batch)))

    def _operation(self, one: Operation, two: Operation, batch: int) -> Operation:
        if one == two:
            return one
        return replace(
            one,
            flops=max(0, self._between(one.flops, two.flops, batch)),
            num_bytes=max(0, self._between(one.num_bytes, two.num_bytes, batch)),
            count=max(1, self._between(one.count, two.count, batch)),
        )


def _distinct(one: list[T], two: list[T]) -> tuple[list[tuple[T, T]], list[int]]:
    """Return the distinct pairs of two lists' members, and the number of the pair at each place."""
    numbers: dict[tuple[T, T], int] = {}
    which = [numbers.setdefault(pair, len(numbers)) for pair in zip(one, two, strict=True)]
    return list(numbers), which
