"""One configuration: memory passes alone, gradient errors against one oracle, then the rounds."""

import datetime
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter

from dit_dp.clipping.registry import METHODS
from memory_test.compare import schema
from memory_test.compare.ratios import less, paired
from memory_test.compare.rounds import run_rounds
from memory_test.compare.suite import Configuration, Entrant
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import Environment, Failure, Repeat, Status
from memory_test.core.units import format_bytes
from memory_test.sweep.process import Outcome, default_threads, work

Say = Callable[[str], None]

_FRAGMENTED = 1.3
"""Heap over allocated bytes, about, where nothing is given back."""

_RUNTIME_BYTES = 400 * 2**20
"""Of torch and its libraries, a process."""


@dataclass(kw_only=True)
class Standing:
    """What is known of a contender so far; it drops out at its first failure and keeps what it has."""

    entrant: Entrant
    config: ExperimentConfig
    status: Status | Literal["skipped"] = "ok"
    failure: Failure | None = None
    memory: Repeat | None = None
    choices: dict[str, Any] = field(default_factory=dict)
    gradient_error: float | None = None
    step_times_s: list[float] = field(default_factory=list)
    noise_times_s: list[float] = field(default_factory=list)

    def take(self, outcome: Outcome) -> dict[str, Any] | None:
        """Return a worker's answer; if it failed, note why and return `None`."""
        if outcome.status == "ok":
            return outcome.answer
        self.status, self.failure = outcome.status, outcome.failure()
        return None

    def skip(self, baseline: str) -> None:
        """Note that there is nothing to compare it with, unless it dropped out before."""
        if self.status == "ok":
            message = f"the baseline, {baseline}, did not finish, so there is nothing to compare with"
            self.status, self.failure = "skipped", Failure(phase=None, message=message)


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What `compare` needs beside the configuration.

    Attributes:
        comparison_id: Hash of everything asked for.
        description: One line for the report.
        environment: Where it runs.
        protocol: Rounds and warm-up.
    """

    comparison_id: str
    description: str
    environment: Environment
    protocol: schema.Protocol


def compare(configuration: Configuration, errand: Errand, say: Say) -> schema.Comparison:
    """Measure every contender of a configuration; whatever happens to one becomes its result.

    Args:
        configuration: Who meets, the baseline first.
        errand: Identity, environment and protocol.
        say: Told what goes on.
    """
    standings = [Standing(entrant=entrant, config=entrant.config) for entrant in configuration.entrants]
    measure_memory(standings, say)
    with tempfile.TemporaryDirectory(prefix="memory-test-oracle-") as folder:
        threshold, oracle_failure = measure_errors(standings, Path(folder), say)
    device = errand.environment.device_type
    keeps = device == "cpu" and have_room(standings)
    measure_time(standings, errand.protocol, say, keeps_freed_memory=keeps)
    return schema.Comparison(
        schema_version=schema.SCHEMA_VERSION,
        comparison_id=errand.comparison_id,
        name=configuration.name,
        description=errand.description,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=errand.environment,
        protocol=errand.protocol,
        keeps_freed_memory=keeps,
        baseline=configuration.baseline.label,
        contenders=[summarise(standing, standings[0], device) for standing in standings],
        max_grad_norm_of_errors=threshold,
        oracle_failure=oracle_failure,
    )


def measure_memory(standings: list[Standing], say: Say) -> None:
    """Take every contender's memory pass, one worker after the other; budgets follow from the baseline's peak."""
    for standing in standings:
        if standing is not standings[0]:
            baseline = standings[0].memory
            if baseline is None or baseline.peak_allocated_bytes is None:
                standing.skip(standings[0].entrant.label)
                continue
            standing.config = standing.entrant.with_budget(baseline.peak_allocated_bytes)
        answer = standing.take(work(standing.config, "memory"))
        if answer is not None:
            standing.memory = TypeAdapter(Repeat).validate_json(json.dumps(answer["repeat"]))
            standing.choices = answer["choices"]
        peak = standing.memory.peak_allocated_bytes if standing.memory else None
        say(f"{standing.entrant.label}: memory pass: {standing.status}, peak {format_bytes(peak)}")


def measure_errors(standings: list[Standing], folder: Path, say: Say) -> tuple[float | None, Failure | None]:
    """Compare every private contender's clipped sum with the float64 loop's.

    The loop runs once for all methods that clip the whole gradient, and once for each that clips otherwise.

    Args:
        standings: The baseline first.
        folder: Where the loop's sums are kept meanwhile.
        say: Told what goes on.

    Returns:
        The threshold at which sums were clipped, and why a loop failed; `None` for what there was not.
    """
    threshold, failure = None, None
    oracles: dict[str, tuple[str, Outcome]] = {}
    for standing in standings:
        method = METHODS[standing.config.experiment]
        if standing.status != "ok" or not method.private:
            continue
        mechanism = "flat" if method.flat else standing.config.experiment
        if mechanism not in oracles:
            say(f"float64 loop over examples, {mechanism} clipping")
            file = str(folder / f"{mechanism}.safetensors")
            oracles[mechanism] = file, work(standing.config, "oracle", {"file": file})
        file, found = oracles[mechanism]
        if found.status != "ok" or found.answer is None:
            failure = failure or found.failure()
            continue
        threshold = found.answer["max_grad_norm"]
        answer = standing.take(work(standing.config, "gradient_error", {"file": file}))
        if answer is not None:
            standing.gradient_error = answer["gradient_error"]
            say(f"{standing.entrant.label}: gradient error {standing.gradient_error:.1e}")
    return threshold, failure


def have_room(standings: list[Standing]) -> bool:
    """Return whether all contenders' peaks fit into this machine's free memory at once, fragmentation included."""
    peaks = [s.memory.peak_allocated_bytes or 0 for s in standings if s.memory is not None]
    return _FRAGMENTED * sum(peaks) + _RUNTIME_BYTES * len(peaks) < psutil.virtual_memory().available


def measure_time(
    standings: list[Standing], protocol: schema.Protocol, say: Say, *, keeps_freed_memory: bool = False
) -> None:
    """Let those who got so far take turns."""
    present = {s.entrant.label: s for s in standings if s.status == "ok"}
    baseline = standings[0].entrant.label
    if baseline not in present:
        return
    configs = {label: s.config for label, s in present.items()}
    outcomes = run_rounds(configs, protocol, say, keeps_freed_memory=keeps_freed_memory)
    for label, standing in present.items():
        answer = standing.take(outcomes[label]) if label in outcomes else None
        if answer is not None:
            standing.step_times_s, standing.noise_times_s = answer["step_times_s"], answer["noise_times_s"]
            standing.choices = {**standing.choices, **answer["choices"]}
    if not standings[0].step_times_s:
        for standing in standings[1:]:
            standing.skip(baseline)


def summarise(standing: Standing, baseline: Standing, device: str) -> schema.Contender:
    """Put a contender's numbers beside the baseline's."""
    times, noise, base = standing.step_times_s, standing.noise_times_s, baseline.step_times_s
    timed = bool(times and base)
    memory = standing.memory
    peak = memory.peak_allocated_bytes if memory else None
    base_peak = baseline.memory.peak_allocated_bytes if baseline.memory else None
    return schema.Contender(
        label=standing.entrant.label,
        method=standing.config.experiment,
        status=standing.status,
        failure=standing.failure,
        config_resolved=standing.config.resolve(device=device, num_threads=default_threads()),
        memory_budget_of_baseline=standing.entrant.memory_budget_of_baseline,
        step_times_s=times,
        noise_times_s=noise,
        time_ratio=paired(times, base) if timed else None,
        time_ratio_without_noise=paired(less(times, noise), base) if timed else None,
        noise_ratio=paired(noise, base) if timed else None,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=memory.peak_reserved_bytes if memory else None,
        breakdown_bytes=memory.breakdown_bytes if memory else {},
        memory_ratio=peak / base_peak if peak and base_peak else None,
        gradient_error=standing.gradient_error,
        choices=standing.choices,
    )
