"""One configuration without a GPU: the measuring loop on an imagined device, replayed through its allocator."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from dit_dp.clipping.costs import measured
from dit_dp.objectives import DDPMObjective
from memory_test.core.measure import Measured, run_loop, summarise
from memory_test.core.meters import MemoryMeter, MemoryReading, Times
from memory_test.core.workload import Data
from memory_test.predict.allocator import AllocatorSettings
from memory_test.predict.cards import Card
from memory_test.predict.fakes import STAND_INS
from memory_test.predict.imagine import imagine, on_this_machine
from memory_test.predict.replay import Peaks, Place, as_log, replay
from memory_test.predict.roofline import Ceilings, operation_seconds, rule_seconds
from memory_test.predict.temporaries import CudaTemporaries
from memory_test.predict.trace import Trace, Tracer

STEPS = 3
"""Steps that are traced: as many as a memory pass takes."""


@dataclass(frozen=True)
class Imagined:
    """A run on a device that is not there.

    Attributes:
        trace: What was born, died and was computed.
        places: Where phases began.
        reading_tags: Which storages were whose, at which mark.
        choices: What the method chose, and parameter counts.
    """

    trace: Trace
    places: tuple[Place, ...]
    tags: tuple[Any, ...]
    choices: dict[str, Any]

    def seconds(self, ceilings: Ceilings) -> list[float]:
        """Return when each event happens if every operation runs at the card's ceilings."""
        ends = [0.0, *accumulate(operation_seconds(op, ceilings) for op in self.trace.operations)]
        return [ends[count] for count in self.trace.event_operations]


class TraceMeter(MemoryMeter):
    """Marks phases in a trace."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self.places: list[Place] = []

    def __enter__(self) -> Self:
        """Do nothing: the tracer is entered with the device."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Do nothing."""

    def _note_position(self, index: int, step: int, phase: str) -> None:
        self.places.append(Place(len(self._tracer.trace.events), step, phase))

    def _address(self, tensor: Tensor) -> int | None:
        return self._tracer.index(tensor)

    @property
    def tags(self) -> list[Any]:
        """Which storages were whose."""
        return self._tags

    def read(self) -> MemoryReading:
        """Not used: a trace is replayed first."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlankImages:
    """Inputs without data, that arrive on the device as they are drawn: stands for an `ImageSet`."""

    channels: int
    size: int

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (N, C, H, W) inputs and (N,) labels."""
        inputs = torch.empty(count, self.channels, self.size, self.size, device="cuda")
        return inputs, torch.empty(count, dtype=torch.int64, device="cuda")


def imagined_run(resolved: dict[str, Any], card: Card | None) -> Imagined:
    """Run the measuring loop on a device that is not there.

    Args:
        resolved: From `ExperimentConfig.resolve`, for ``cuda`` with a card, for ``cpu`` without.
        card: Which; `None`: this machine's CPU.
    """
    if card is None:
        tracer = Tracer(stand_ins=STAND_INS, host_too=True)
        cost = on_this_machine(measured(torch.device("cpu"), torch.float32))
        data = None
    else:
        tracer = Tracer(CudaTemporaries(card), STAND_INS)
        cost = rule_seconds(Ceilings.of(card))
        data = _blank_data(resolved)
    meter = TraceMeter(tracer)
    with imagine(tracer, card, cost):
        choices = run_loop(resolved, meter, STEPS, lambda phase: None, data=data)
        tracer.stop()
    kernels = {op.name for op in tracer.trace.operations if op.name.startswith("_scaled_dot_product")}
    choices["attention_kernels"] = sorted(name for name in kernels if not name.endswith("backward"))
    return Imagined(tracer.trace, tuple(meter.places), tuple(meter.tags), choices)


def _blank_data(resolved: dict[str, Any]) -> Data:
    """Return batches without data; what the objective keeps stays on the host."""
    objective = DDPMObjective(learn_sigma=resolved["learn_sigma"], class_dropout_prob=resolved["class_dropout_prob"])
    images: Any = BlankImages(resolved["in_channels"], resolved["latent_size"])
    return Data(images, objective, "cpu", torch.Generator(), torch.Generator())


def predict_memory(
    run: Imagined,
    card: Card | None,
    *,
    settings: AllocatorSettings | None = None,
    sizes: Sequence[int] | None = None,
    limited: bool = False,
) -> Measured:
    """Return what a memory pass on the device would have found.

    Args:
        run: The imagined run.
        card: Where; `None`: this machine's CPU, whose allocator rounds nothing and keeps nothing.
        settings: Of the caching allocator.
        sizes: Bytes by storage, for another batch; default: the run's.
        limited: Whether the card's memory is the limit; otherwise the demand is returned, whatever the card has.

    Raises:
        OutOfMemoryError: The card is too small, if it limits.
    """
    asked = [storage.num_bytes for storage in run.trace.storages] if sizes is None else list(sizes)
    ceilings = Ceilings.of(card)
    peaks: Peaks = {}
    if card is None:
        held, source = asked, "predicted: storages of a traced step"
    else:
        capacity = card.usable_bytes if limited else None
        replayed = replay(run.trace, run.places, sizes=asked, settings=settings, capacity_bytes=capacity)
        held, peaks, source = (
            replayed.sizes,
            replayed.peaks,
            "predicted: a traced step through a model of the caching allocator",
        )
    log = as_log(run.trace, held, run.places, run.tags, run.seconds(ceilings))
    reading = MemoryReading(log, peaks=peaks, source=source)
    repeat = summarise(reading, Times({}, {}, {}), range(0), None)
    if card is not None and repeat.peak_reserved_bytes is not None:
        use = card.context_bytes + repeat.peak_reserved_bytes
        repeat = dataclasses.replace(repeat, process_bytes=use, device_used_bytes=use, context_bytes=card.context_bytes)
    return Measured(repeat, run.choices)
