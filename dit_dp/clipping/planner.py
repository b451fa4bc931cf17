"""Which weights keep per-unit gradients, how large a physical batch, which blocks are recomputed: least time in budget.

Pure arithmetic over two trials (`probe`): storages with their lives, one unit's and two units' sizes. What is booked
lengthens lives to the end of the backward, what is recomputed cuts them in two; the peak is read off the curve.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, zip_longest
from typing import Literal, get_args

from dit_dp.clipping.lives import Trial, WeightCall

NormRule = Literal["ghost", "direct", "tiled"]
NORM_RULES: tuple[NormRule, ...] = get_args(NormRule)
RULES: tuple[NormRule | Literal["keep"], ...] = ("keep", *NORM_RULES)
Cost = Callable[[str, int, WeightCall], float]
"""Seconds of ``keep`` or a norm rule for so many units of a weight: norm and clipped sum; infinity if it cannot run."""


@dataclass(frozen=True)
class Plan:
    """What an engine is to do.

    Attributes:
        physical_batch: Units taken at a time.
        keep: Weights whose per-unit gradients are kept; of all others the operands are.
        norms: Rule for the norm of the others.
        booked: How many of the first blocks book in the first backward; the rest are revisited.
        stored: How many of the last blocks keep their graph; the rest are recomputed.
        peak_bytes: Predicted peak of the step, all included.
    """

    physical_batch: int
    keep: frozenset[str]
    norms: Mapping[str, NormRule]
    booked: int
    stored: int
    peak_bytes: int


@dataclass(frozen=True)
class Step:
    """What is known of a step beyond the trials.

    Attributes:
        trials: Of one unit and, if there are two, of two.
        blocks: Names of blocks in the order in which they run.
        parameter_bytes: Bytes of each trainable parameter's gradient.
        static_bytes: What is held all the time: parameters, optimizer state, the batch.
        num_units: U.
    """

    trials: tuple[Trial, ...]
    blocks: tuple[str, ...]
    parameter_bytes: Mapping[str, int]
    static_bytes: int
    num_units: int


def make_plan(step: Step, budget_bytes: int, cost: Cost) -> Plan:
    """Return the fastest plan whose predicted peak is within a budget.

    The largest physical batch that fits with every block stored and booked comes first: recomputing costs a third of
    a step and more, a smaller batch next to nothing. If not even one unit fits, blocks are recomputed, as few as will
    do. The leanest plan of all is returned if none fits: its `peak_bytes` says what it would take.
    """
    blocks = len(step.blocks)
    for parts in range(1, step.num_units + 1):
        batch = -(-step.num_units // parts)
        if parts > 1 and -(-step.num_units // (parts - 1)) == batch:
            continue
        plan = _fill(Curve(step, batch), cost, blocks, blocks, budget_bytes)
        if plan.peak_bytes <= budget_bytes:
            return plan
    if blocks == 0:
        return plan
    curve = Curve(step, 1)

    def fits(booked: int, stored: int) -> bool:
        return _fill(curve, cost, booked, stored, budget_bytes).peak_bytes <= budget_bytes

    booked = _largest(1, blocks, lambda count: fits(count, 1))
    stored = _largest(1, blocks if booked < blocks else blocks - 1, lambda count: fits(booked, count))
    return _fill(curve, cost, booked, stored, budget_bytes)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest count in [low, high] that fits, by bisection; `low` if none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fill(curve: "Curve", cost: Cost, booked: int, stored: int, budget: int) -> Plan:
    """Choose rules: the fastest; while the peak is too high, what saves most bytes a second lost.

    Where the peak lies elsewhere a change lowers nothing that counts in the end, so what need not have been changed is
    changed back, the slowest first.
    """
    batch, weights = curve.batch, curve.weights
    norms: dict[str, NormRule] = {}
    slower: dict[str, float] = {}
    for name, call in weights.items():
        times = {rule: cost(rule, batch, call) for rule in NORM_RULES}
        norms[name] = min(NORM_RULES, key=times.__getitem__)
        slower[name] = cost("keep", batch, call) - times[norms[name]]
    keep = {name for name, seconds in slower.items() if seconds < 0}
    peak = curve.peak(keep, booked, stored)
    saving = {name: curve.saved_by_keeping(name) for name in weights}
    swaps = sorted(
        (name for name in weights if (saving[name] > 0) != (name in keep)),
        key=lambda name: abs(slower[name]) / max(1, abs(saving[name])),
    )
    for name in swaps:
        if peak <= budget:
            break
        changed = keep ^ {name}
        lower = curve.peak(changed, booked, stored)
        if lower < peak:
            keep, peak = changed, lower
    swapped = [name for name in swaps if (name in keep) != (slower[name] < 0)]
    for name in sorted(swapped, key=lambda name: -abs(slower[name])):
        changed = keep ^ {name}
        higher = curve.peak(changed, booked, stored)
        if higher <= budget:
            keep, peak = changed, higher
    return Plan(batch, frozenset(keep), norms, booked, stored, peak)


@dataclass(frozen=True)
class _BlockBytes:
    """A block's instants and bytes.

    Attributes:
        saved: What its forward saves.
        edge: Its inputs; its outputs are about as large.
        excess: By how much its backward rises above where it began.
    """

    name: str
    forward_end: int
    backward_start: int
    backward_end: int
    saved: int
    edge: int
    excess: int


@dataclass
class Curve:
    """Bytes over the instants of a step, for a physical batch.

    Attributes:
        weights: A call of each weight that has more than one position, and so a choice of rules.
    """

    step: Step
    batch: int
    weights: dict[str, WeightCall] = field(init=False)

    def __post_init__(self) -> None:
        self._trial = self.step.trials[-1]
        count = self._trial.num_units
        self._bytes = [
            self._scale(single, life.num_bytes, count)
            for life, single in zip(self._trial.lives, self._single_bytes(), strict=True)
        ]
        self._split = self.batch < self.step.num_units
        self.static = self.step.static_bytes + (sum(self.step.parameter_bytes.values()) if self._split else 0)
        self._calls: dict[str, list[WeightCall]] = {}
        for call in self._trial.weights:
            self._calls.setdefault(call.name, []).append(call)
        self.weights = {
            name: calls[-1] for name, calls in self._calls.items() if sum(call.positions for call in calls) > 1
        }

    def _single_bytes(self) -> list[float]:
        """Return the bytes of each storage in a trial of one unit.

        What outlives its trial is a cache that whoever came first has filled, such as an objective's tables on a GPU:
        it is in one trial alone, and does not grow.
        """
        first, last = self.step.trials[0].lives, self._trial.lives
        passing = [life for life in first if life.dies is not None]
        if len(passing) != sum(life.dies is not None for life in last):
            return [life.num_bytes / self._trial.num_units for life in last]
        singles = iter(passing)
        return [life.num_bytes if life.dies is None else next(singles).num_bytes for life in last]

    def _scale(self, single: float, several: int, count: int) -> int:
        """Return a size at this batch from those of one unit and of `count`."""
        if count == 1:
            return int(single * self.batch)
        return int(single + (several - single) / (count - 1) * (self.batch - 1))

    def kept_bytes(self, name: str) -> int:
        """Bytes of the per-unit gradients of a weight, float32 or better."""
        call = self._calls[name][0]
        return self.batch * call.width * call.out_width * max(4, call.element_size)

    def operands(self, name: str) -> set[int]:
        """Storages of a weight's inputs and output gradients."""
        return {index for call in self._calls[name] for index in call.operands if index is not None}

    def saved_by_keeping(self, name: str) -> int:
        """Bytes of operands less bytes of per-unit gradients; negative if keeping takes more."""
        return sum(self._bytes[index] for index in self.operands(name)) - self.kept_bytes(name)

    def peak(self, keep: Iterable[str], booked: int, stored: int) -> int:
        """Return the predicted peak of a step: forward and backward, then clipped sums, then second visits."""
        keep = set(keep)
        trial = self._trial
        delta = [0] * (trial.end + 2)
        for life, size in zip(trial.lives, self._bytes, strict=True):
            delta[life.born] += size
            delta[life.dies or trial.end] -= size
        revisited = self._cut(delta, booked, stored)
        books = self._book(delta, keep, revisited)
        live = max(accumulate(delta[: trial.end + 1]))
        return self.static + max(live, self._clip(books, revisited))

    def _cut(self, delta: list[int], booked: int, stored: int) -> dict[str, tuple[int, int]]:
        """Take blocks' activations away between forward and backward; return (visit, boundary) bytes of revisits."""
        revisited = {}
        for position, block in enumerate(self._blocks):
            if position < len(self._blocks) - stored:
                delta[block.forward_end] -= block.saved
                delta[block.backward_start] += block.saved + block.edge
                delta[block.backward_end] -= block.edge
            if position >= booked:
                delta[block.backward_start] += block.edge
                revisited[block.name] = (block.saved + block.excess, 2 * block.edge)
        return revisited

    @cached_property
    def _blocks(self) -> list["_BlockBytes"]:
        """What every plan of this batch needs to know of the blocks, in the order in which they ran."""
        trial = self._trial
        windows = {name: (begin, end) for name, begin, end in trial.windows}
        names = [name for name in self.step.blocks if name in windows]
        borders = {index for indices in trial.inputs.values() for index in indices}
        instants = {
            name: [call.instant for call in trial.weights if call.name.startswith(f"{name}.")] for name in names
        }
        births = [life.born for life in trial.lives]
        found = []
        for name, later in zip_longest(names, names[1:]):
            begin, end = windows[name]
            start = max(instants[later] if later else [], default=trial.backward)
            last = max(instants[name], default=start)
            saved = sum(
                self._bytes[index]
                for index in range(bisect_right(births, begin), bisect_right(births, end))
                if (trial.lives[index].dies or trial.end) > end and index not in borders
            )
            edge = sum(self._bytes[index] for index in trial.inputs.get(name, ()))
            found.append(_BlockBytes(name, end, start, last, saved, edge, self._excess(start, last)))
        return found

    def _excess(self, start: int, last: int) -> int:
        """Return by how much a stretch of the backward rises above where it began."""
        times, sizes = self._changes
        inside = sizes[bisect_right(times, start) : bisect_right(times, last)]
        return max(accumulate(inside, initial=0))

    @cached_property
    def _changes(self) -> tuple[list[int], list[int]]:
        """When storages come and go, in order, and by how many bytes."""
        lives = list(zip(self._trial.lives, self._bytes, strict=True))
        events = [(life.born, size) for life, size in lives]
        events += [(life.dies, -size) for life, size in lives if life.dies is not None]
        events.sort(key=lambda event: event[0])
        return [instant for instant, _ in events], [size for _, size in events]

    def _book(self, delta: list[int], keep: set[str], revisited: Mapping[str, object]) -> list[tuple[str, int]]:
        """Lengthen the lives of what is booked; return (weight, bytes) in the order of booking."""
        trial, held, books = self._trial, set[int](), []
        for name, calls in self._calls.items():
            again = next((block for block in revisited if name.startswith(f"{block}.")), None)
            if name in keep and again is None:
                size = self.kept_bytes(name)
                delta[calls[-1].instant] += size
            elif again is not None and calls[-1].positions > 1:
                continue
            else:
                size = 0
                for index in self.operands(name) - held:
                    size += self._bytes[index]
                    delta[trial.lives[index].dies or trial.end] += self._bytes[index]
                    held.add(index)
            delta[trial.end] -= size
            books.append((calls[-1].instant, name, size))
        return [(name, size) for _, name, size in sorted(books)]

    def _clip(self, books: list[tuple[str, int]], revisited: Mapping[str, tuple[int, int]]) -> int:
        """Return the peak of the clipped sums: gradients come while the book goes, newest first, then the visits."""
        sizes = {} if self._split else dict(self.step.parameter_bytes)
        later = {name: sum(size for p, size in sizes.items() if p.startswith(f"{name}.")) for name in revisited}
        gradients = 0
        remaining = sum(size for _, size in books)
        edges = sum(edge for _, edge in revisited.values())
        highest = remaining + edges
        for name, size in reversed(books):
            gradients += sizes.pop(name, 0)
            highest = max(highest, remaining + gradients + edges)
            remaining -= size
        half = -(-self.batch // 2) / self.batch
        gradients = (0 if self._split else sum(self.step.parameter_bytes.values())) - sum(later.values())
        for name, (visit, edge) in revisited.items():
            gradients += later[name]
            highest = max(highest, gradients + edges + int(visit * half))
            edges -= edge
        return highest
