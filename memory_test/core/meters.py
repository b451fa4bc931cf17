"""What watches the loop: clocks in a timing pass, allocators in a memory pass.

A meter is told of every phase's beginning (`mark`) and, in a memory pass, which tensors are held at that moment.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dit_dp.clipping.hardware import NORM_SCOPE
from memory_test.core.breakdown import Event, Log, Mark, PartMark, Tag
from memory_test.core.nvml import DeviceUse, device_use

END = "idle"
"""The mark that ends a step."""

_SCOPE_FUNCTIONS = frozenset({"observe", "capture_backprops_hook"})
"""Functions whose allocations are norm and Gram buffers; the CUDA allocator's history has Python frames, not ranges."""

Holdings = Callable[[], Iterable[tuple[str, Tensor, str | None]]]
"""Yields (category, tensor, part of the model) for everything held now."""


class Meter(ABC):
    """Told where the loop is."""

    @abstractmethod
    def mark(self, step: int, phase: str) -> None:
        """Note that `phase` of step number `step` (0: before the first) begins now."""

    @abstractmethod
    def hold(self, holdings: Holdings) -> None:
        """Learn how to ask which tensors are held."""

    @property
    def tell_part(self) -> Callable[[str | None], None] | None:
        """Who is told which part of the model runs; `None`: nobody, and then nobody looks."""
        return None


# --- time -----------------------------------------------------------------------------------------------------


class Clock(Meter):
    """Times phases: CUDA events on CUDA, a monotonic clock elsewhere. Nothing is synchronised before `read`.

    Args:
        device: ``cuda`` or ``cpu``.
        rss_step: Step in which the resident set is noted.
        of_processor: On CPU, time that this process had a core, all its threads together; else time that went by.
    """

    def __init__(self, device: str, rss_step: int = 1, *, of_processor: bool = False) -> None:
        self._cuda, self._now = device == "cuda", time.process_time if of_processor else time.perf_counter
        self._marks: list[tuple[int, str, Any]] = []
        self._rss_step = rss_step
        self._rss: dict[str, int] = {}
        self._process = psutil.Process()

    def mark(self, step: int, phase: str) -> None:
        """Note the time; in one untimed step also the resident set at the end of each phase."""
        if self._marks and (self._marks[-1][0] == self._rss_step or (phase == "input" and step == 0)):
            self._rss[self._marks[-1][1]] = self._process.memory_info().rss
        if self._cuda:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((step, phase, event))
        else:
            self._marks.append((step, phase, self._now()))

    def hold(self, holdings: Holdings) -> None:
        """Keep nothing: what `holdings` reaches must be gone when the memory pass begins."""

    def read(self) -> "Times":
        """Return what was timed."""
        if self._cuda:
            torch.cuda.synchronize()
        steps: dict[int, float] = {}
        phases: dict[str, dict[int, float]] = {}
        for (step, phase, start), (_, _, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase in (END, "input"):
                continue
            seconds = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            by_step = phases.setdefault(phase, {})
            by_step[step] = by_step.get(step, 0.0) + seconds
            if phase != "model":
                steps[step] = steps.get(step, 0.0) + seconds
        return Times(steps, phases, self._rss)


@dataclass(frozen=True)
class Times:
    """Seconds by step, and by phase and step; the resident set (bytes) at each phase's end."""

    steps: dict[int, float]
    phases: dict[str, dict[int, float]]
    rss: dict[str, int]

    def phase_median(self, phase: str, steps: Iterable[int]) -> float | None:
        """Return the median time of a phase over steps; the model phase has only step 0."""
        by_step = self.phases.get(phase, {})
        values = [by_step[s] for s in ([0] if phase == "model" else steps) if s in by_step]
        return median(values) if values else None


# --- memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryReading:
    """What a memory pass found.

    Attributes:
        log: Events, marks and tags.
        peaks: (allocated, reserved) bytes by (step, phase) from the allocator's own counters, where it has them.
        device_use: What NVML said at the end of each (step, phase).
        baseline: Bytes allocated before the log began.
        kernels: Attention kernels that ran.
        source: Where the numbers come from, for the record.
    """

    log: Log
    peaks: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    device_use: dict[tuple[int, str], DeviceUse] = field(default_factory=dict)
    baseline: int = 0
    kernels: tuple[str, ...] = ()
    source: str = ""


class TaggingMeter(Meter):
    """Marks in a log, and the tags taken at them."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, str]] = []
        self._tags: list[Tag] = []
        self._parts: list[str | None] = []
        self._holdings: Holdings | None = None

    def hold(self, holdings: Holdings) -> None:
        """Ask `holdings` at every mark from now on."""
        self._holdings = holdings

    def mark(self, step: int, phase: str) -> None:
        """Note the position in the log and who holds what."""
        self._note_position(len(self._steps), step, phase)
        if self._holdings is not None:
            for category, tensor, part in self._holdings():
                address = self._address(tensor)
                if address is not None:
                    self._tags.append(Tag(len(self._steps), address, category, part))
        self._steps.append((step, phase))

    @property
    def tell_part(self) -> Callable[[str | None], None]:
        """Who is told which part of the model runs."""
        return self._begin_part

    def _begin_part(self, part: str | None) -> None:
        self._note_part(len(self._parts))
        self._parts.append(part)

    def _address(self, tensor: Tensor) -> int | None:
        """Return the address of a tensor's storage in the log; `None` if it is not there."""
        return tensor.untyped_storage().data_ptr() or None

    @abstractmethod
    def _note_position(self, index: int, step: int, phase: str) -> None:
        """Make mark number `index` findable in the log."""

    @abstractmethod
    def _note_part(self, index: int) -> None:
        """Make the beginning of part number `index` findable in the log."""


class MemoryMeter(TaggingMeter):
    """Common to both devices: what watches between its entry and its exit, and is read afterwards."""

    @abstractmethod
    def __enter__(self) -> Self:
        """Begin to watch."""

    @abstractmethod
    def __exit__(self, *error: Any) -> None:
        """Stop watching."""

    @abstractmethod
    def read(self) -> MemoryReading:
        """Return what was found; call after the pass."""


class CpuMemoryMeter(MemoryMeter):
    """The CPU allocator's every allocation, operators' temporaries included, from the profiler's events."""

    _PREFIX, _PART = "memory_test.mark:", "memory_test.part:"

    def __enter__(self) -> Self:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)  # type: ignore[no-untyped-call]

    def _note_position(self, index: int, step: int, phase: str) -> None:
        with record_function(f"{self._PREFIX}{index}"):
            pass

    def _note_part(self, index: int) -> None:
        with record_function(f"{self._PART}{index}"):
            pass

    def read(self) -> MemoryReading:
        """Walk the profiler's event tree once."""
        assert self._profile.profiler is not None
        assert self._profile.profiler.kineto_results is not None
        kernels: set[str] = set()
        found: list[tuple[int, str, Any]] = []  # time (ns), kind, (address, size, scope) or a mark's number
        stack = [(node, False) for node in self._profile.profiler.kineto_results.experimental_event_tree()]
        while stack:
            node, scope = stack.pop()
            name = node.name
            if name == "[memory]":
                extra: Any = node.extra_fields
                found.append((node.start_time_ns, "", (extra.ptr, extra.alloc_size, scope)))
                continue
            if name.startswith((self._PREFIX, self._PART)):
                kind, colon, number = name.partition(":")
                found.append((node.start_time_ns, kind + colon, int(number)))
            elif name.startswith("aten::_scaled_dot_product"):
                kernels.add(name.removeprefix("aten::"))
            scope = scope or name == NORM_SCOPE
            stack.extend((child, scope) for child in node.children)
        found.sort(key=lambda item: item[0])
        events: list[Event] = []
        marks: list[Mark] = []
        parts: list[PartMark] = []
        for when, kind, what in found:
            if kind == self._PREFIX:
                marks.append(Mark(len(events), when / 1e9, *self._steps[what]))
            elif kind == self._PART:
                parts.append(PartMark(len(events), self._parts[what]))
            else:
                address, size, in_scope = what
                events.append(Event(when / 1e9, address, size, in_scope))
        return MemoryReading(
            Log(events, marks, self._tags, parts),
            kernels=forward_only(kernels),
            source="CPU allocator events of the torch profiler",
        )


class CudaMemoryMeter(MemoryMeter):
    """The caching allocator's counters and its history of allocations.

    A mark's position in the history is the number of allocations and releases the allocator has counted.
    """

    def __enter__(self) -> Self:
        torch.cuda.synchronize()
        self._baseline = torch.cuda.memory_allocated()
        self._positions: list[tuple[int, float]] = []
        self._part_positions: list[int] = []
        self._peaks: dict[tuple[int, str], tuple[int, int]] = {}
        self._device_use: dict[tuple[int, str], DeviceUse] = {}
        self._first: tuple[int, int] | None = None
        self._kernels: set[str] = set()
        self._kernel_profile: Any = None
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=2_000_000)
        self._origin = self._count()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        self._close_phase()
        self._counted = self._count() - self._origin
        self._snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)

    @staticmethod
    def _count() -> int:
        stats = torch.cuda.memory_stats()
        return int(stats["allocation.all.allocated"] + stats["allocation.all.freed"])

    def _close_phase(self) -> None:
        """Read the peaks of the phase that ends and start those of the next."""
        if self._steps:
            key = self._steps[-1]
            now = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
            held = self._peaks.get(key, (0, 0))
            self._peaks[key] = (max(held[0], now[0]), max(held[1], now[1]))
            self._device_use[key] = device_use()
        torch.cuda.reset_peak_memory_stats()

    def _note_part(self, index: int) -> None:
        self._part_positions.append(self._count() - self._origin)

    def _note_position(self, index: int, step: int, phase: str) -> None:
        self._close_phase()
        self._positions.append((self._count() - self._origin, time.time()))
        if step == 1 and phase == "forward":
            self._kernel_profile = profile(activities=[ProfilerActivity.CPU])
            self._kernel_profile.__enter__()
        elif self._kernel_profile is not None:
            self._kernel_profile.__exit__(None, None, None)
            names = (event.key for event in self._kernel_profile.key_averages())
            self._kernels |= {n.removeprefix("aten::") for n in names if n.startswith("aten::_scaled_dot_product")}
            self._kernel_profile = None

    def read(self) -> MemoryReading:
        """Turn the allocator's history into a log."""
        history = self._snapshot["device_traces"][torch.cuda.current_device()]
        events = []
        for entry in history:
            if entry["action"] in ("alloc", "free_requested"):
                sign = 1 if entry["action"] == "alloc" else -1
                scope = any(frame["name"] in _SCOPE_FUNCTIONS for frame in entry.get("frames", ()))
                events.append(Event(entry["time_us"] / 1e6, entry["addr"], sign * entry["size"], scope))
        if len(events) != self._counted:
            raise RuntimeError(f"the allocator counted {self._counted} events and its history holds {len(events)}")
        marks = [Mark(position, when, *self._steps[index]) for index, (position, when) in enumerate(self._positions)]
        parts = [PartMark(position, part) for position, part in zip(self._part_positions, self._parts, strict=True)]
        return MemoryReading(
            Log(events, marks, self._tags, parts),
            peaks=self._peaks,
            device_use=self._device_use,
            baseline=self._baseline,
            kernels=forward_only(self._kernels),
            source="CUDA caching allocator: peak counters and memory history",
        )


def forward_only(kernels: set[str]) -> tuple[str, ...]:
    """Return the attention kernels of a forward, by name."""
    return tuple(sorted(name for name in kernels if not name.endswith("backward")))


def memory_meter(device: str) -> MemoryMeter:
    """Return the memory meter of a device."""
    return CudaMemoryMeter() if device == "cuda" else CpuMemoryMeter()
