"""The loop every number comes from: one function, run once with clocks and once with allocator meters."""

import contextlib
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.batch import Batch, tensors_of
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.ranks import local
from dit_dp.training import Ema, make_optimizer, train_step
from memory_test.core import breakdown as logs
from memory_test.core.meters import END, Clock, MemoryReading, Meter, Times, memory_meter
from memory_test.core.parts import parts_by_name, parts_told
from memory_test.core.schema import PHASES, PhaseRecord, Repeat
from memory_test.core.workload import Data, build, engine_options, loss_function

Gate = Callable[[int], None]
"""Awaited before a step, told its number."""

Wrap = Callable[[nn.Module], nn.Module]
"""From a model on its device to what a method is attached to, such as its replica or shard among several ranks."""

MEMORY_STEPS = 3
"""Steps of a memory pass: the first, whose optimizer state is born in it, and two steady ones."""


EMA_DECAY = 0.9999
"""DiT's; no cost depends on it."""


@dataclass(frozen=True)
class Measured:
    """One process's result: its numbers and what was found out on the way."""

    repeat: Repeat
    choices: dict[str, Any]


def measure(resolved: dict[str, Any], on_progress: Callable[[str], None]) -> Measured:
    """Measure one cell in this process: a timing pass, then a memory pass of the same loop.

    Args:
        resolved: From `ExperimentConfig.resolve`.
        on_progress: Told ``pass: phase`` at every phase, so that a parent knows where a worker died.
    """
    warmup, timed = resolved["warmup"], resolved["num_iter"]
    steady = range(2 + warmup, 2 + warmup + timed)
    times, choices = time_steps(resolved, on_progress, steady)
    peak_rss = _peak_rss_bytes()
    gc.collect()
    release(resolved["device"])
    reading, found = _memory_pass(resolved, on_progress)
    return Measured(summarise(reading, times, steady, peak_rss), {**choices, **found})


def measure_memory(resolved: dict[str, Any], on_progress: Callable[[str], None]) -> Measured:
    """Take the memory pass alone; the result has no times. Arguments as for `measure`."""
    torch.set_num_threads(resolved["num_threads"])
    reading, choices = _memory_pass(resolved, on_progress)
    return Measured(summarise(reading, Times({}, {}, {}), range(0), None), choices)


def time_steps(
    resolved: dict[str, Any],
    on_progress: Callable[[str], None],
    timed: range,
    gate: Gate | None = None,
    *,
    of_processor: bool = False,
) -> tuple[Times, dict[str, Any]]:
    """Run the loop under a clock.

    Args:
        resolved: From `ExperimentConfig.resolve`.
        on_progress: As for `measure`.
        timed: Numbers of the steps that count; the loop ends with the last.
        gate: As for `run_loop`.
        of_processor: As for `Clock`.

    Returns:
        The times of all steps, drawing the input left out, and what was chosen automatically.
    """
    torch.set_num_threads(resolved["num_threads"])
    clock = Clock(resolved["device"], rss_step=timed[0] - 1, of_processor=of_processor)
    choices = run_loop(resolved, clock, timed[-1], lambda phase: on_progress(f"timing: {phase}"), gate)
    return clock.read(), choices


def _memory_pass(resolved: dict[str, Any], on_progress: Callable[[str], None]) -> tuple[MemoryReading, dict[str, Any]]:
    """Run the loop under a memory meter; return its reading and what was chosen or found out."""
    with memory_meter(resolved["device"]) as meter:
        choices = run_loop(resolved, meter, MEMORY_STEPS, lambda phase: on_progress(f"memory: {phase}"))
    on_progress("memory: analysing")
    reading = meter.read()
    return reading, {**choices, "attention_kernels": list(reading.kernels)}


def run_loop(
    resolved: dict[str, Any],
    meter: Meter,
    num_steps: int,
    on_progress: Callable[[str], None],
    gate: Gate | None = None,
    said_device: str | None = None,
    wrap: Wrap | None = None,
) -> dict[str, Any]:
    """Build everything and take `num_steps` steps, telling the meter of every phase.

    Args:
        resolved: From `ExperimentConfig.resolve`.
        meter: What watches.
        num_steps: Steps to take.
        on_progress: Told of every phase.
        gate: Called with the number of each step before it begins, between phases; may wait.
        said_device: What tensors on the device say where they are; default: the truth.
        wrap: What is done to the model after it is built; default: nothing.

    Returns:
        What was chosen automatically, and parameter counts.
    """
    step = 0

    def announce(phase: str) -> None:
        on_progress(phase)
        meter.mark(step, phase)

    announce("model")
    engine, optimizer, ema, make_data = _build(resolved, announce, wrap)
    announce("input")
    data = make_data(said_device or resolved["device"])
    del make_data  # and with it rows that are not used
    loss_fn = loss_function(data, resolved["dtype"])
    batch: Batch = {}
    meter.hold(lambda: _holdings(engine, optimizer, ema, batch))
    told = meter.tell_part if wrap is None and not resolved["compile"] else None
    settings: dict[str, Any] = {
        "noise_multiplier": resolved["noise_multiplier"],
        "expected_batch_size": resolved["batch_size"] * resolved["accumulation"] * resolved.get("world_size", 1),
        "generator": data.device_generator,
        "ema": ema,
        "on_phase": announce,
        "row_to_unit": data.row_to_unit,
    }

    def batches() -> Iterator[Batch]:
        nonlocal batch
        for _ in range(resolved["accumulation"]):
            announce("input")
            batch = {}  # the last one goes before the next comes
            batch = data.batch(resolved["batch_size"])
            yield batch

    with contextlib.nullcontext() if told is None else parts_told(engine.model, told):
        for step in range(1, num_steps + 1):
            if gate is not None:
                gate(step)
            train_step(engine, optimizer, loss_fn, batches(), **settings)
            announce(END)
    return _choices(engine)


def _build(
    resolved: dict[str, Any], announce: Callable[[str], None], wrap: Wrap | None
) -> tuple[Engine, torch.optim.Optimizer, Ema | None, Callable[[str], Data]]:
    """Return the engine, attached to a new model, the optimizer of its parameters, their average, what makes data."""
    torch.manual_seed(resolved["seed"])
    workload = build(resolved)
    model = workload.model.to(resolved["device"])
    if resolved["compile"]:
        model.compile()  # in place; what it compiles, and when, is the first step's to pay
    if wrap is not None:
        model = wrap(model)
    options = engine_options(resolved)
    engine = attach(model, resolved["experiment"], resolved["max_grad_norm"], on_phase=announce, **options)
    optimizer = make_optimizer(
        resolved["optimizer"],
        engine.parameters.values(),
        learning_rate=resolved["learning_rate"],
        implementation=resolved["optimizer_impl"],
    )
    ema = Ema(engine.parameters.values(), EMA_DECAY) if resolved["ema"] else None
    return engine, optimizer, ema, workload.make_data


def _holdings(
    engine: Engine, optimizer: torch.optim.Optimizer, ema: Ema | None, batch: Batch
) -> Iterator[tuple[str, Tensor, str | None]]:
    """Yield everything held now, with its category and, where it is a parameter's, its part of the model."""
    model, parts = engine.model, parts_by_name(engine.model)
    for name, parameter in model.named_parameters():
        yield "parameters", local(parameter), parts.get(name)
        if parameter.grad is not None:
            yield "gradients", local(parameter.grad), parts.get(name)
    for buffer in model.buffers():
        yield "parameters", buffer, None
    owners: dict[Tensor, str | None] = {p: parts.get(name) for name, p in engine.parameters.items()}
    for owner, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor):
                yield "optimizer_state", local(value), owners.get(owner)
    for part, average in zip(owners.values(), ema.tensors if ema else (), strict=False):
        yield "optimizer_state", local(average), part
    for category, tensor in engine.tracked_tensors():
        yield category, tensor, None
    for tensor in tensors_of(batch):
        yield "input", tensor, None


def _choices(engine: Engine) -> dict[str, Any]:
    trainable = sum(p.numel() for p in engine.parameters.values())
    return {
        "num_parameters": sum(p.numel() for p in engine.model.parameters()),
        "num_trainable_parameters": trainable,
        **engine.choices(),
    }


def summarise(reading: MemoryReading, times: Times, steady: range, peak_rss: int | None) -> Repeat:
    """Put one process's observations into a record."""
    log = reading.log
    totals = logs.running_total(log.events)
    last = max(mark.step for mark in log.marks)
    later = range(2, last + 1)
    peak, position = logs.peak_within(totals, logs.span(log, later))
    first, _ = logs.peak_within(totals, logs.span(log, [1]))
    peak, first = peak + reading.baseline, first + reading.baseline
    reserved = None
    if reading.peaks:  # the allocator's own counters are the authority; the log explains them
        peak = max(held[0] for (step, _), held in reading.peaks.items() if step in later)
        first = max(held[0] for (step, _), held in reading.peaks.items() if step == 1)
        reserved = max(held[1] for held in reading.peaks.values())
    uses = reading.device_use.values()  # of the process, if it is seen: others on the device come and go
    use = max(uses, key=lambda u: (u.process_bytes or 0, u.used_bytes or 0)) if uses else None
    return Repeat(
        first_step_peak_allocated_bytes=first,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        process_bytes=use.process_bytes if use else None,
        device_used_bytes=use.used_bytes if use else None,
        context_bytes=use.process_bytes - (reserved or 0) if use and use.process_bytes else None,
        memory_source=f"{reading.source}; {use.note}" if use else reading.source,
        peak_rss_bytes=peak_rss,
        first_step_s=times.steps.get(1),
        step_times_s=[times.steps[step] for step in steady],
        phases={phase: _phase(phase, reading, totals, times, steady, later) for phase in _phases_seen(log)},
        breakdown_bytes=logs.breakdown(log, position, peak),
        breakdown_by_part=logs.breakdown_by_part(log, position),
        timeline=logs.timeline(log, last, reading.baseline),
    )


def _phases_seen(log: logs.Log) -> list[str]:
    seen = {mark.phase for mark in log.marks}
    return [phase for phase in PHASES if phase in seen]


def _phase(
    phase: str, reading: MemoryReading, totals: list[int], times: Times, steady: range, later: range
) -> PhaseRecord:
    """Return the largest peak of a phase over the steady steps (the model phase: step 0), and its median time."""
    steps = [0] if phase == "model" else list(later)
    counted = [reading.peaks[step, phase] for step in steps if (step, phase) in reading.peaks]
    allocated = logs.peak_within(totals, logs.span(reading.log, steps, phase))[0] + reading.baseline
    use = reading.device_use.get((steps[-1], phase))
    return PhaseRecord(
        peak_allocated_bytes=max(held[0] for held in counted) if counted else allocated,
        peak_reserved_bytes=max(held[1] for held in counted) if counted else None,
        process_bytes=use.process_bytes if use else None,
        device_used_bytes=use.used_bytes if use else None,
        rss_bytes=times.rss.get(phase),
        time_s=times.phase_median(phase, steady),
    )


def release(device: str) -> None:
    """Finish what was launched and give cached memory back: to another pass, or to another process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
