"""From a trace to what an allocator would have held: block sizes, peaks by phase, the card's limit."""

from collections.abc import Sequence
from dataclasses import dataclass

from memory_test.core.breakdown import Event, Log, Mark, PartMark, Tag
from memory_test.predict.allocator import Block, CachingAllocator, OutOfMemoryError, Recorder
from memory_test.predict.settings import AllocatorSettings
from memory_test.predict.trace import Trace

Peaks = dict[tuple[int, str], tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """The beginning of a phase, before the event at `position` and after so many operations."""

    position: int
    step: int
    phase: str
    operations: int = 0


@dataclass(frozen=True)
class Replayed:
    """What an allocator held.

    Attributes:
        sizes: Block size by storage; 0 where nothing was allocated.
        peaks: (allocated, reserved) bytes by (step, phase).
        num_retries: How often cached segments were given back for want of memory.
    """

    sizes: list[int]
    peaks: Peaks
    num_retries: int


def replay(
    trace: Trace,
    places: Sequence[Place],
    *,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
    record: Recorder | None = None,
    total_bytes: int | None = None,
) -> Replayed:
    """Run a trace through a model of CUDA's caching allocator.

    Args:
        trace: Storages and events.
        places: Where phases begin.
        settings: Of the allocator.
        capacity_bytes: What the card leaves to it; default: no limit.
        record: Told of the allocator's every action.
        total_bytes: Of the card, which `memory_fraction` is a share of; default: `capacity_bytes`.

    Raises:
        OutOfMemoryError: The card is too small.
    """
    allocator = CachingAllocator(settings, capacity_bytes, record, total_bytes)
    blocks: list[Block | None] = [None] * len(trace.storages)
    held = [0] * len(trace.storages)
    peaks: Peaks = {}
    begins = [place.position for place in places] + [len(trace.events)]

    def run(start: int, end: int) -> None:
        for index in trace.events[start:end]:
            if trace.storages[index].num_bytes > 0:
                block = blocks[index]
                if block is None:
                    block = blocks[index] = allocator.malloc(trace.storages[index].num_bytes)
                    held[index] = block.size
                else:
                    allocator.free(block)

    run(0, begins[0])
    for place, start, end in zip(places, begins, begins[1:], strict=False):
        allocator.reset_peaks()
        try:
            run(start, end)
        except OutOfMemoryError as error:
            error.phase = place.phase
            raise
        key = (place.step, place.phase)
        before = peaks.get(key, (0, 0))
        peaks[key] = (max(before[0], allocator.peak_allocated), max(before[1], allocator.peak_reserved))
    return Replayed(held, peaks, allocator.num_retries)


def as_log(
    trace: Trace,
    sizes: Sequence[int],
    places: Sequence[Place],
    tags: Sequence[Tag],
    parts: Sequence[PartMark],
    seconds: Sequence[float],
) -> Log:
    """Return the trace as a memory pass's log.

    Args:
        trace: Storages and events.
        sizes: Bytes by storage.
        places: Where phases begin.
        tags: Whose `address` is the storage's index.
        parts: Whose positions are those of the trace's events.
        seconds: When each event happens.
    """
    events, positions, seen = [], [0], set[int]()
    for index, when in zip(trace.events, seconds, strict=True):
        if sizes[index] > 0:
            sign = -1 if index in seen else 1
            seen.add(index)
            events.append(Event(when, index, sign * sizes[index], trace.storages[index].scope))
        positions.append(len(events))
    last = seconds[-1] if seconds else 0.0
    marks = [
        Mark(positions[p.position], seconds[p.position] if p.position < len(seconds) else last, p.step, p.phase)
        for p in places
    ]
    moved = [PartMark(positions[min(part.position, len(trace.events))], part.part) for part in parts]
    return Log(events, marks, tags, moved)
