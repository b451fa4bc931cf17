"""Run one cell in processes of its own and turn whatever happens into a record."""

import datetime
import hashlib
import json
import math
import sys
from statistics import median
from typing import Any

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import SCHEMA_VERSION, Environment, PhaseRecord, Record, Repeat
from memory_test.sweep.process import Outcome, default_threads, work

_PROBE_TIMEOUT_S = 300.0


def run_cell(config: ExperimentConfig, *, usage_is_error: bool = False) -> Record:
    """Measure one cell: `config.repeats` fresh processes, one after the other.

    Args:
        config: The cell.
        usage_is_error: Record what the worker calls the user's mistake as ``error``, as a sweep does, instead
            of raising it.

    Returns:
        The record, whatever happened. Repeats stop at the first that fails.

    Raises:
        UsageError: The worker found a mistake in the configuration, and `usage_is_error` is not set.
    """
    outcomes: list[Outcome] = []
    for _ in range(config.repeats):
        outcomes.append(work(config, "measure"))
        answer = outcomes[-1].answer
        if answer is not None and answer["status"] == "usage" and not usage_is_error:
            raise UsageError(answer["message"])
        if answer is None or answer["status"] != "ok":
            break
    return _record(config, outcomes)


def probe(config: ExperimentConfig) -> tuple[Environment, dict[str, Any]]:
    """Return the environment and the resolved configuration that a worker sees, without measuring.

    Raises:
        UsageError: The configuration is wrong for this machine, or workers cannot start here.
    """
    outcome = work(config, "probe", timeout_s=_PROBE_TIMEOUT_S)
    if outcome.answer is not None and outcome.answer["status"] == "usage":
        raise UsageError(outcome.answer["message"])
    if outcome.header is None:
        reason = outcome.stderr_tail.strip().splitlines()[-1:] or ["no message"]
        raise UsageError(f"worker: cannot start with {sys.executable}: {reason[0]}")
    return Environment(**outcome.header["environment"]), outcome.header["resolved"]


def cell_id(resolved: dict[str, Any], environment: Environment) -> str:
    """Return the identity of a cell: a hash of its resolved configuration and of where it runs."""
    return digest([_measured_part(resolved), environment.identity()])


def config_digest(resolved: dict[str, Any]) -> str:
    """Return the hash of a resolved configuration alone, for file names."""
    return digest(_measured_part(resolved))


def _measured_part(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without the limits, which decide whether there is a number, not which."""
    return {name: value for name, value in resolved.items() if name not in ("timeout_s", "memory_limit_gib")}


def digest(data: Any) -> str:
    """Return a short hash of JSON-ready data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


# --- from outcomes to a record ----------------------------------------------------------------------------------


def _record(config: ExperimentConfig, outcomes: list[Outcome]) -> Record:
    """Summarise the repeats of a cell."""
    last = outcomes[-1]
    header = next((o.header for o in outcomes if o.header is not None), None)
    environment = Environment(**header["environment"]) if header else None
    resolved = header["resolved"] if header else config.resolve(device=config.device, num_threads=default_threads())
    status = last.status
    answers = [o.answer for o in outcomes if o.answer is not None and o.answer["status"] == "ok"]
    repeats = [_repeat(answer["repeat"]) for answer in answers]
    times = [seconds for repeat in repeats for seconds in repeat.step_times_s]
    complete = status == "ok"
    examples = config.batch_size * config.accumulation
    worst = max(repeats, key=lambda r: r.peak_allocated_bytes or 0) if complete else None
    return Record(
        schema_version=SCHEMA_VERSION,
        status=status,
        source="measured",
        experiment=config.experiment,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cell_id=cell_id(resolved, environment) if environment else config_digest(resolved),
        peak_allocated_bytes=worst.peak_allocated_bytes if worst else None,
        peak_reserved_bytes=_largest([r.peak_reserved_bytes for r in repeats]) if complete else None,
        first_step_s=_median([r.first_step_s for r in repeats]) if complete else None,
        step_times_s=times if complete else [],
        throughput_examples_per_s=examples / median(times) if complete and times else None,
        phases=_phases(repeats) if complete else {},
        breakdown_bytes=worst.breakdown_bytes if worst else {},
        breakdown_by_part=worst.breakdown_by_part if worst else {},
        config_requested=config.as_dict(),
        config_resolved=resolved,
        choices=answers[-1]["choices"] if answers else {},
        environment=environment,
        timeline=worst.timeline if worst else None,
        failure=None if complete else last.failure(),
        repeats=repeats,
    )


def _repeat(data: dict[str, Any]) -> Repeat:
    from pydantic import TypeAdapter

    repeat: Repeat = TypeAdapter(Repeat).validate_json(json.dumps(data))
    return repeat


def _phases(repeats: list[Repeat]) -> dict[str, PhaseRecord]:
    """Return the largest peaks and median times over repeats."""
    names = list(dict.fromkeys(name for repeat in repeats for name in repeat.phases))
    found = {name: [r.phases[name] for r in repeats if name in r.phases] for name in names}
    return {
        name: PhaseRecord(
            peak_allocated_bytes=_largest([p.peak_allocated_bytes for p in phases]),
            peak_reserved_bytes=_largest([p.peak_reserved_bytes for p in phases]),
            process_bytes=_largest([p.process_bytes for p in phases]),
            device_used_bytes=_largest([p.device_used_bytes for p in phases]),
            rss_bytes=_largest([p.rss_bytes for p in phases]),
            time_s=_median([p.time_s for p in phases]),
        )
        for name, phases in found.items()
    }


def _largest(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return median(known) if known else None
