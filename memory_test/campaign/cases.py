"""Memory passes of single configurations with options of the allocator: the measured side of predictions.

Each is a small JSON: peaks and phases as `memory_test.predict.emulator.record.numbers` has them, what NVML saw, and the
environment.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
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
from memory_test.core.units import format_bytes
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
    folder, done, failed = site.folder(part.name), 0, 0
    for trial in trials:
        path = folder / trial.file_name
        earlier = kept(path, site.environment, site.on_mismatch)
        if earlier is not None and not (site.retry_failed and earlier["status"] not in FINE):
            done, failed = done + 1, failed + (earlier["status"] not in FINE)
            continue
        seconds = pace.begin()
        result = None if seconds is None else measure(trial, site.environment, seconds)
        if result is None:
            break
        write_measured(json.dumps(result, indent=1) + "\n", path)
        done, failed = done + 1, failed + (result["status"] not in FINE)
        site.say(f"{part.name}: {trial.name}: {_short(result)}")
    return Outcome(done=done, left=len(trials) - done, failed=failed)


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
