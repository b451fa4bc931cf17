"""Memory passes of single configurations with options of the allocator: the measured side of predictions.

Each is a small JSON: peaks and phases as `memory_test.predict.emulator.record.numbers` has them, what NVML saw, and the
environment.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from memory_test.campaign.budget import Pace
from memory_test.campaign.campaign import Outcome, Site
from memory_test.campaign.parts import Part
from memory_test.core.config import ExperimentConfig
from memory_test.core.measure import Measured
from memory_test.core.schema import Environment, Repeat
from memory_test.core.store import read, write_measured
from memory_test.core.units import GIB, format_bytes
from memory_test.predict.emulator.cases import CASES, Case, allocator_options
from memory_test.predict.emulator.record import numbers
from memory_test.sweep.process import Outcome as WorkerOutcome
from memory_test.sweep.process import work
from memory_test.sweep.sweep import OnMismatch, same_environment

SCHEMA_VERSION = 1
CASE_TIMEOUT_S = 180.0
FINE = ("ok", "oom")
"""How a case may end."""

USE = ("process_bytes", "device_used_bytes", "context_bytes", "memory_source")

LARGE_MODELS, LARGE_CAP = ("DiT-L/2", "DiT-XL/2"), 16 * GIB
"""A trial of one of these models takes half the card at most; one with a larger cap may take all of it."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One configuration to measure.

    Attributes:
        case: Model, method, batch, allocator.
        usable_bytes: What the allocator may reserve, if less than there is.
    """

    case: Case
    usable_bytes: int | None = None
    device: str = "cuda"

    @property
    def name(self) -> str:
        """What is measured, in words."""
        return self.case.name + (f" in {self.usable_bytes} bytes" if self.usable_bytes is not None else "")

    @property
    def file_name(self) -> str:
        """Readable, and unique by the name."""
        changes = self.case.changes
        parts = [changes["experiment"], changes["model"].replace("/", "-"), f"b{changes['batch_size']}"]
        return "-".join([*parts, hashlib.sha256(self.name.encode()).hexdigest()[:8]]) + ".json"

    @property
    def config(self) -> ExperimentConfig:
        """The cell."""
        return ExperimentConfig(**{**self.case.changes, "device": self.device})

    def lanes(self, available: int) -> int:
        """Return how many of the lanes that there are it takes, so that those beside it do not move its peaks.

        `auto` takes all: it times its rules, and by default its budget is what is free.
        """
        if self.case.changes["experiment"] == "auto" or (self.usable_bytes or 0) > LARGE_CAP:
            return available
        return -(-available // 2) if self.case.changes["model"] in LARGE_MODELS else 1

    def memory_fraction(self, total_bytes: int) -> float | None:
        """Return the share of a card's memory that the allocator may reserve."""
        if self.usable_bytes is not None:
            return self.usable_bytes / total_bytes
        return self.case.settings.memory_fraction


def run_cases(part: Part, site: Site, pace: Pace) -> Outcome:
    """Measure the configurations that were compared with the emulator."""
    return run_trials([Trial(case) for case in CASES], part, site, pace)


def run_trials(trials: Sequence[Trial], part: Part, site: Site, pace: Pace) -> Outcome:
    """Measure what has no result yet, as far as there is time."""
    assert site.environment is not None
    folder, pending, done, failed = site.folder(part.name), [], 0, 0
    for trial in trials:
        earlier = kept(folder / trial.file_name, site.environment, site.on_mismatch)
        if earlier is None or (site.retry_failed and earlier["status"] not in FINE):
            pending.append(trial)
        else:
            done, failed = done + 1, failed + (earlier["status"] not in FINE)
    for group in side_by_side(pending, site.lanes):
        seconds = pace.begin()
        if seconds is None:
            break
        for trial, result in zip(group, _measure_all(group, site.environment, seconds), strict=True):
            if result is not None:
                write_measured(json.dumps(result, indent=1) + "\n", folder / trial.file_name)
                done, failed = done + 1, failed + (result["status"] not in FINE)
                site.say(f"{part.name}: {trial.name}: {_short(result)}")
    return Outcome(done=done, left=len(trials) - done, failed=failed)


def side_by_side(trials: Sequence[Trial], lanes: int) -> Iterator[list[Trial]]:
    """Yield the trials in order, in groups that share the card: the allocator's peaks are each process's own."""
    group: list[Trial] = []
    for trial in trials:
        if group and sum(other.lanes(lanes) for other in group) + trial.lanes(lanes) > lanes:
            yield group
            group = []
        group.append(trial)
    if group:
        yield group


def _measure_all(group: Sequence[Trial], environment: Environment, seconds: float) -> list[Result | None]:
    """Measure trials at once; what the whole card holds is nobody's then, and is left out."""
    if len(group) == 1:
        return [measure(group[0], environment, seconds)]
    with ThreadPoolExecutor(len(group)) as pool:
        found = list(pool.map(lambda trial: measure(trial, environment, seconds), group))
    for result in found:
        if result is not None:
            result["use"] = {name: value for name, value in result["use"].items() if name != "device_used_bytes"}
    return found


def _short(result: Result) -> str:
    """Return a result in a few words."""
    if result["status"] == "oom":
        return "does not fit"
    if result["status"] != "ok":
        return f"{result['status']}: {(result.get('failure') or {}).get('message', '')}"
    peaks = result["peaks"]
    reserved = format_bytes(peaks["peak_reserved_bytes"])
    return f"{format_bytes(peaks['peak_allocated_bytes'])} allocated, {reserved} reserved"


def kept(path: Path, environment: Environment, on_mismatch: OnMismatch) -> Result | None:
    """Return a result that is there and of this environment, but for the allocator's options, which are the case's.

    Raises:
        UsageError: It is of another environment, and `on_mismatch` says to refuse it; or it is unreadable.
    """
    if not path.exists():
        return None
    found = load(path)
    measured_in = TypeAdapter(Environment).validate_json(json.dumps(found["environment"]))
    measured_in = dataclasses.replace(measured_in, allocator=environment.allocator)
    return found if same_environment(measured_in, environment, path, on_mismatch) else None


def load(path: Path) -> Result:
    """Read a result.

    Raises:
        UsageError: Not JSON, half-written, or of a newer version.
    """
    found: Result = read(path, TypeAdapter(dict[str, Any]), "measured case", SCHEMA_VERSION)
    return found


def measure(trial: Trial, environment: Environment, seconds: float = CASE_TIMEOUT_S) -> Result | None:
    """Measure one configuration in a process of its own; `None` if `seconds` cut it short.

    Args:
        trial: What.
        environment: Of the device, for its memory.
        seconds: Wall time that is left.
    """
    options, limit = allocator_options(trial.case.settings), min(seconds, CASE_TIMEOUT_S)
    fraction = trial.memory_fraction(environment.device_memory_bytes)
    variables = {"PYTORCH_ALLOC_CONF": options} if options else {}
    begun = time.monotonic()
    outcome = work(trial.config, "memory", {"memory_fraction": fraction}, limit, variables)
    if outcome.timed_out and limit < CASE_TIMEOUT_S:
        return None
    header = outcome.header or {"environment": dataclasses.asdict(environment)}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": trial.name,
        "changes": trial.case.changes,
        "allocator": {"options": options, "memory_fraction": fraction},
        "usable_bytes": trial.usable_bytes,
        "environment": header["environment"],
        "status": outcome.status,
        "failure": None if outcome.status == "ok" else dataclasses.asdict(outcome.failure()),
        **_numbers(outcome),
        "seconds": round(time.monotonic() - begun, 1),
    }


def _numbers(outcome: WorkerOutcome) -> Result:
    """Return what was measured; empty if nothing was."""
    if outcome.status != "ok" or outcome.answer is None:
        return {"peaks": {}, "phases": {}, "choices": {}, "use": {}}
    repeat = TypeAdapter(Repeat).validate_json(json.dumps(outcome.answer["repeat"]))
    found = numbers(Measured(repeat, outcome.answer["choices"]))
    return {**found, "use": {name: getattr(repeat, name) for name in USE}}
