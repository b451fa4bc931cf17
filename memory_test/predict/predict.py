"""One configuration without a GPU: the measuring loop on an imagined device, replayed through its allocator."""

import contextlib
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dit_dp.clipping.costs import measured
from memory_test.core.breakdown import PartMark, Tag
from memory_test.core.custom import load_target
from memory_test.core.measure import MEMORY_STEPS, Measured, Wrap, run_loop, summarise
from memory_test.core.meters import MemoryReading, TaggingMeter, Times, forward_only
from memory_test.core.model_args import is_custom
from memory_test.predict.cards import Card
from memory_test.predict.cpu_temporaries import CpuTemporaries
from memory_test.predict.fakes import STAND_INS
from memory_test.predict.garbage import rarely_collected
from memory_test.predict.imagine import imagine, on_this_machine
from memory_test.predict.replay import Peaks, Place, as_log, replay
from memory_test.predict.roofline import Rates, operation_seconds, rule_seconds
from memory_test.predict.settings import AllocatorSettings
from memory_test.predict.steady import with_another_step
from memory_test.predict.temporaries import CudaTemporaries
from memory_test.predict.trace import Trace
from memory_test.predict.tracer import Tracer


@dataclass(frozen=True)
class Imagined:
    """A run on a device that is not there.

    Attributes:
        trace: What was born, died and was computed.
        places: Where phases began.
        tags: Which storages were whose, at which mark.
        parts: Which part of the model ran, from which event on.
        choices: What the method chose, and parameter counts.
    """

    trace: Trace
    places: tuple[Place, ...]
    tags: tuple[Tag, ...]
    parts: tuple[PartMark, ...]
    choices: dict[str, Any]

    def seconds(self, rates: Rates) -> list[float]:
        """Return when each event happens if every operation runs at these rates."""
        ends = [0.0, *accumulate(op.count * operation_seconds(op, rates) for op in self.trace.operations)]
        return [ends[count] for count in self.trace.event_operations]

    def with_another_step(self) -> "Imagined | None":
        """Return the run with its last step taken once more; `None` if that is not like the next."""
        longer = with_another_step(self.trace, self.places, self.tags)
        if longer is None:
            return None
        trace, places, tags = longer
        trace.order_deaths(place.position for place in places)
        start = next(place.position for place in self.places if place.step == self.places[-1].step)
        span = self.places[-1].position - start
        again = (replace(part, position=part.position + span) for part in self.parts if part.position >= start)
        return replace(self, trace=trace, places=tuple(places), tags=tuple(tags), parts=(*self.parts, *again))


class TraceMeter(TaggingMeter):
    """Marks phases in a trace."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self.places: list[Place] = []
        self.part_positions: list[int] = []

    def _note_position(self, index: int, step: int, phase: str) -> None:
        trace = self._tracer.trace
        self.places.append(Place(len(trace.events), step, phase, len(trace.operations)))

    def _note_part(self, index: int) -> None:
        self.part_positions.append(len(self._tracer.trace.events))

    def _address(self, tensor: Tensor) -> int | None:
        return self._tracer.index(tensor)

    @property
    def tags(self) -> list[Tag]:
        """Which storages were whose."""
        return self._tags

    @property
    def parts(self) -> list[PartMark]:
        """Which part of the model ran, from which event on."""
        return [PartMark(position, part) for position, part in zip(self.part_positions, self._parts, strict=True)]


def imagined_run(
    resolved: dict[str, Any],
    card: Card | None,
    num_steps: int = MEMORY_STEPS,
    *,
    whole: bool = True,
    rates: Rates | None = None,
) -> Imagined:
    """Run the measuring loop on a device that is not there.

    Args:
        resolved: From `ExperimentConfig.resolve`, for ``cuda`` with a card, for ``cpu`` without.
        card: Which; `None`: this machine's CPU.
        num_steps: At least 2; those after the second are it again.
        whole: Whether the first step's look for examples that are not kept apart is traced; it takes a third of the
            time, and steady steps do not depend on it.
        rates: What methods that plan count time with; default: the card's ceilings.
    """
    run = _run(resolved, card, min(num_steps, 2), whole, rates)
    for _ in range(2, num_steps):
        longer = run.with_another_step()
        if longer is None:
            return _run(resolved, card, num_steps, whole, rates)
        run = longer
    return run


def _run(resolved: dict[str, Any], card: Card | None, num_steps: int, whole: bool, rates: Rates | None) -> Imagined:
    """Trace every step."""
    if card is None:
        tracer = Tracer(CpuTemporaries(resolved["num_threads"]), STAND_INS, host_too=True)
        cost = on_this_machine(measured(torch.device("cpu"), torch.float32))
    else:
        tracer = Tracer(CudaTemporaries(card), STAND_INS)
        cost = rule_seconds(rates or Rates.ceilings(card))
    meter = TraceMeter(tracer)
    if is_custom(resolved["model"], resolved["pretrained"]):
        load_target(resolved["model"])  # a module that is imported later keeps tensors without data
    with rarely_collected(), _ranks(tracer, resolved) as wrap, imagine(tracer, card, cost, whole=whole):
        choices = run_loop(resolved, meter, num_steps, lambda phase: None, said_device="cpu", wrap=wrap)
        tracer.stop()
    tracer.trace.order_deaths(place.position for place in meter.places)
    kernels = {op.name for op in tracer.trace.operations if op.name.startswith("_scaled_dot_product")}
    choices["attention_kernels"] = list(forward_only(kernels))
    return Imagined(tracer.trace, tuple(meter.places), tuple(meter.tags), tuple(meter.parts), choices)


def _ranks(tracer: Tracer, resolved: dict[str, Any]) -> contextlib.AbstractContextManager[Wrap | None]:
    """Return the other ranks, if the configuration names any; `torch.distributed` is loaded only then."""
    if resolved.get("world_size", 1) == 1:
        return contextlib.nullcontext()
    from memory_test.predict.ranks import imagined_ranks

    return imagined_ranks(tracer, resolved["world_size"], resolved["sharding"])


def predict_memory(
    run: Imagined,
    card: Card | None,
    *,
    settings: AllocatorSettings | None = None,
    limited: bool = False,
    rates: Rates | None = None,
) -> Measured:
    """Return what a memory pass on the device would have found.

    Args:
        run: The imagined run.
        card: Where; `None`: this machine's CPU, whose allocator rounds nothing and keeps nothing.
        settings: Of the caching allocator.
        limited: Whether the card's memory is the limit; otherwise the demand is returned, whatever the card has.
        rates: For the timeline; default: the card's ceilings.

    Raises:
        OutOfMemoryError: The card is too small, if it limits.
    """
    peaks: Peaks = {}
    if card is None:
        held = [storage.num_bytes for storage in run.trace.storages]
        source = "predicted: storages of a traced step"
    else:
        usable, total = (card.usable_bytes, card.memory_bytes) if limited else (None, None)
        replayed = replay(run.trace, run.places, settings=settings, capacity_bytes=usable, total_bytes=total)
        held, peaks = replayed.sizes, replayed.peaks
        source = "predicted: a traced step through a model of the caching allocator"
    log = as_log(run.trace, held, run.places, run.tags, run.parts, run.seconds(rates or Rates.ceilings(card)))
    reading = MemoryReading(log, peaks=peaks, source=source)
    repeat = summarise(reading, Times({}, {}, {}), range(0), None)
    if card is not None and repeat.peak_reserved_bytes is not None:
        use = card.context_bytes + repeat.peak_reserved_bytes
        repeat = replace(repeat, process_bytes=use, device_used_bytes=use, context_bytes=card.context_bytes)
    return Measured(repeat, run.choices)
