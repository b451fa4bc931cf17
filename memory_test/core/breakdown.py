"""From a log of allocations to what a peak consists of. Pure functions over observed events; no torch.

An allocation is a birth and, mostly, a death at positions in the log. Its category comes from what was
observed: a tensor that the model, the optimizer or the engine held at a phase border (a tag), the profiler range it
was born in, or the phases in which it was born and died.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from memory_test.core.schema import BREAKDOWN, Timeline

TAG_PRIORITY = (
    "parameters",
    "optimizer_state",
    "gradients",
    "per_example_gradients",
    "kept_for_clipping",
    "input",
)
"""Where one allocation carries several tags, the first of these wins."""

MAX_TIMELINE_POINTS = 600

ELSEWHERE = "elsewhere"
"""What belongs to no part of the model."""


class Event(NamedTuple):
    """One allocation (`size` > 0) or release (`size` < 0); its position in the log is its index."""

    time_s: float
    address: int
    size: int
    scope: bool = False
    """Whether it happened in the range that engines open for norm and Gram buffers."""


@dataclass(frozen=True)
class Mark:
    """The beginning of a phase: before the event at `position`."""

    position: int
    time_s: float
    step: int
    phase: str


@dataclass(frozen=True)
class Tag:
    """At mark number `mark`, the storage at `address` belonged to `category`."""

    mark: int
    address: int
    category: str
    part: str | None = None
    """The model's part that it belongs to, if it is known."""


@dataclass(frozen=True)
class PartMark:
    """From the event at `position` on, or until a phase begins, a part of the model runs; `None`: none of them."""

    position: int
    part: str | None


class Allocation(NamedTuple):
    """A block of memory from its birth (position in the log) to its death (`None`: it outlived the log)."""

    address: int
    size: int
    born: int
    died: int | None
    scope: bool

    def alive_at(self, position: int) -> bool:
        """Return whether it exists after the event at `position`."""
        return self.born <= position and (self.died is None or self.died > position)


@dataclass(frozen=True)
class Log:
    """Everything one memory pass observed."""

    events: Sequence[Event]
    marks: Sequence[Mark]
    tags: Sequence[Tag] = field(default_factory=tuple)
    parts: Sequence[PartMark] = field(default_factory=tuple)

    @cached_property
    def born(self) -> list[Allocation]:
        """Every allocation."""
        return allocations(self.events)

    @cached_property
    def winning_tags(self) -> dict[tuple[int, int], Tag]:
        """The tag that counts of each tagged allocation, by address and birth."""
        return _tagged(self)


def allocations(events: Sequence[Event]) -> list[Allocation]:
    """Pair births with deaths by address. A release of something born before the log is skipped."""
    born: dict[int, int] = {}
    done: list[Allocation] = []
    for position, event in enumerate(events):
        if event.size > 0:
            born[event.address] = position
        elif event.address in born:
            start = born.pop(event.address)
            first = events[start]
            done.append(Allocation(event.address, first.size, start, position, first.scope))
    for start in born.values():
        first = events[start]
        done.append(Allocation(first.address, first.size, start, None, first.scope))
    return done


def running_total(events: Sequence[Event]) -> list[int]:
    """Return the bytes allocated after each event; releases of what was born before the log are skipped."""
    total, totals, born = 0, [], set()
    for event in events:
        if event.size > 0:
            born.add(event.address)
            total += event.size
        elif event.address in born:
            born.remove(event.address)
            total += event.size
        totals.append(total)
    return totals


def span(log: Log, steps: Iterable[int], phase: str | None = None) -> list[tuple[int, int]]:
    """Return [start, end) positions of the given steps' phases (all phases, or one)."""
    wanted = set(steps)
    ends = [mark.position for mark in log.marks[1:]] + [len(log.events)]
    return [
        (mark.position, end)
        for mark, end in zip(log.marks, ends, strict=True)
        if mark.step in wanted and (phase is None or mark.phase == phase)
    ]


def peak_within(totals: Sequence[int], spans: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the largest total and its position over spans; what was allocated at a span's start counts.

    Positions are -1 where the peak is the (empty) beginning of the log.
    """
    best, at = 0, -1
    for start, end in spans:
        if start > 0 and totals[start - 1] > best:
            best, at = totals[start - 1], start - 1
        for position in range(start, end):
            if totals[position] > best:
                best, at = totals[position], position
    return best, at


def breakdown(log: Log, position: int, measured_peak: int) -> dict[str, int]:
    """Attribute what was allocated at one instant.

    Args:
        log: The memory pass.
        position: The instant, normally that of the peak.
        measured_peak: The allocator's own figure; what the log does not explain is `unattributed`.

    Returns:
        Bytes by category; they add up to `measured_peak`.
    """
    result = dict.fromkeys(BREAKDOWN, 0)
    for category, _, size in _held_at(log, position):
        result[category] += size
    result["unattributed"] = measured_peak - sum(result.values())
    return result


def breakdown_by_part(log: Log, position: int) -> dict[str, dict[str, int]]:
    """Attribute what was allocated at one instant to the parts of the model.

    What belongs to a parameter (itself, its gradient, its optimizer state) is its part's. All else is the part's in
    whose forward, recomputed forward or backward it was born; a part's backward begins where the gradient of its output
    is known and ends where that of another part's is.

    Returns:
        Bytes by part and category, nothing where there is none; `ELSEWHERE` is what no part was running for, such as
        the loss. A category adds up to that of `breakdown`. Empty if the log knows no parts.
    """
    result: dict[str, dict[str, int]] = {}
    for category, part, size in _held_at(log, position) if log.parts else ():
        sizes = result.setdefault(part or ELSEWHERE, {})
        sizes[category] = sizes.get(category, 0) + size
    return result


def _held_at(log: Log, position: int) -> Iterator[tuple[str, str | None, int]]:
    """Yield category, part and size of every allocation that exists after the event at `position`."""
    for allocation in log.born:
        if allocation.alive_at(position):
            tag = log.winning_tags.get((allocation.address, allocation.born))
            category = _by_life(log, allocation) if tag is None else tag.category
            part = None if tag is None else tag.part
            yield category, part or _part_at(log, allocation.born), allocation.size


def _part_at(log: Log, position: int) -> str | None:
    """Return the part of the model that ran at an event, in the phase that the event falls into."""
    index = bisect_right(log.parts, position, key=lambda mark: mark.position) - 1
    phase = _mark_before(log, position)
    if index < 0 or phase < 0 or log.parts[index].position < log.marks[phase].position:
        return None
    return log.parts[index].part


def _tagged(log: Log) -> dict[tuple[int, int], Tag]:
    """Return the winning tag of each tagged allocation."""
    births: dict[int, list[Allocation]] = defaultdict(list)
    for allocation in sorted(log.born, key=lambda item: item.born):
        births[allocation.address].append(allocation)
    tags: dict[tuple[int, int], Tag] = {}
    for tag in log.tags:
        before = log.marks[tag.mark].position - 1
        candidates = births.get(tag.address, [])
        index = bisect_right(candidates, before, key=lambda item: item.born) - 1
        if index < 0 or not candidates[index].alive_at(before):
            continue
        key = (tag.address, candidates[index].born)
        held = tags.get(key)
        if held is None or TAG_PRIORITY.index(tag.category) < TAG_PRIORITY.index(held.category):
            tags[key] = tag
    return tags


def _mark_before(log: Log, position: int) -> int:
    """Return the number of the phase that an event falls into; -1 before the first."""
    return bisect_right(log.marks, position, key=lambda mark: mark.position) - 1


def _by_life(log: Log, allocation: Allocation) -> str:
    """Return the category that birth and death imply."""
    if allocation.scope:
        return "kept_for_clipping"
    index = _mark_before(log, allocation.born)
    if index < 0:
        return "other"
    born_in = log.marks[index]
    if born_in.phase in ("noise", "input"):
        return born_in.phase
    if born_in.phase == "forward" and allocation.died is not None:
        end = log.marks[index + 1].position if index + 1 < len(log.marks) else len(log.events)
        died_in = log.marks[_mark_before(log, allocation.died)]
        if allocation.died >= end and died_in.step == born_in.step:
            return "saved_activations"  # what outlives its step is a library's workspace, not an activation
    return "other"


def timeline(log: Log, step: int, offset: int = 0) -> Timeline | None:
    """Return one step's allocated bytes against time, thinned so that every bucket keeps its extremes.

    Args:
        log: The memory pass.
        step: Which step.
        offset: Bytes allocated before the log began.
    """
    spans = [s for s in span(log, [step])]
    marks = [mark for mark in log.marks if mark.step == step and mark.phase not in ("input", "idle")]
    if not spans or not marks:
        return None
    start, end = marks[0].position, max(stop for _, stop in spans)
    totals, origin = running_total(log.events), marks[0].time_s
    positions = _thin(totals, start, end)
    before = totals[start - 1] if start else 0
    return Timeline(
        time_s=[0.0] + [max(0.0, log.events[p].time_s - origin) for p in positions],
        allocated_bytes=[before + offset] + [totals[p] + offset for p in positions],
        phase_names=[mark.phase for mark in marks],
        phase_start_s=[mark.time_s - origin for mark in marks],
    )


def _thin(totals: Sequence[int], start: int, end: int) -> list[int]:
    """Return positions from [start, end): first, smallest and largest of each bucket."""
    count = end - start
    buckets = max(1, min(count, MAX_TIMELINE_POINTS // 3))
    kept: set[int] = set()
    for bucket in range(buckets):
        low, high = start + bucket * count // buckets, start + (bucket + 1) * count // buckets
        if low < high:
            kept |= {low, max(range(low, high), key=totals.__getitem__), min(range(low, high), key=totals.__getitem__)}
    return sorted(kept)
