"""What a worker does, by name. Loads torch: imported in the worker, under its memory limit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from memory_test.core import gradient_error as exactness
from memory_test.core import measure as measuring
from memory_test.core.schema import Repeat
from memory_test.sweep.turns import WorkerTurns, untimed_turns

Say = Callable[[str], None]
Answer = dict[str, Any]


def measure(resolved: dict[str, Any], say: Say) -> Answer:
    """Measure one cell: time, then memory."""
    return _repeat_answer(measuring.measure(resolved, say))


def memory(resolved: dict[str, Any], say: Say, *, memory_fraction: float | None = None) -> Answer:
    """Take the memory pass of one cell alone.

    Args:
        resolved: From `ExperimentConfig.resolve`.
        say: Told of every phase.
        memory_fraction: CUDA: share of the card that the allocator may reserve.
    """
    if memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction)
    return _repeat_answer(measuring.measure_memory(resolved, say))


def turns(
    resolved: dict[str, Any],
    say: Say,
    *,
    token: int,
    done: int,
    rounds: int,
    settle_steps: int,
    of_processor: bool = False,
) -> Answer:
    """Take steps in turns with other workers; see `memory_test.sweep.turns`.

    Args:
        resolved: From `ExperimentConfig.resolve`; says how many turns after the first are not timed.
        say: Told of every phase.
        token: File descriptor from which permission for a turn is read.
        done: File descriptor to which the end of a turn is written.
        rounds: Timed turns.
        settle_steps: Steps of every turn before the one that counts.
        of_processor: Time what a core did, not what went by.
    """
    each = settle_steps + 1
    untimed = untimed_turns(resolved["warmup"])
    gate = WorkerTurns(token, done, each, lambda: measuring.release(resolved["device"]))
    timed = range((untimed + 1) * each, (untimed + rounds) * each + 1, each)
    times, choices = measuring.time_steps(resolved, say, timed, gate, of_processor=of_processor)
    noise = times.phases.get("noise", {})
    return {
        "step_times_s": [times.steps[step] for step in timed],
        "noise_times_s": [noise.get(step, 0.0) for step in timed],
        "choices": choices,
    }


def oracle(resolved: dict[str, Any], say: Say, *, file: str) -> Answer:
    """Compute the clipped sum in float64 and leave it in a file."""
    say("oracle")
    return vars(exactness.write_oracle(resolved, Path(file)))


def gradient_error(resolved: dict[str, Any], say: Say, *, file: str) -> Answer:
    """Compare a method's clipped sum with the oracle's file."""
    return {"gradient_error": exactness.gradient_error(resolved, Path(file), say)}


def _repeat_answer(measured: measuring.Measured) -> Answer:
    return {
        "repeat": TypeAdapter(Repeat).dump_python(measured.repeat, mode="json"),
        "choices": measured.choices,
    }


TASKS: dict[str, Callable[..., Answer]] = {
    function.__name__: function for function in (measure, memory, turns, oracle, gradient_error)
}
