"""Run one cell in processes of its own and turn whatever happens into a record."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import (
    SCHEMA_VERSION,
    Environment,
    Failure,
    PhaseRecord,
    Record,
    Repeat,
    Status,
)
from memory_test.core.units import GIB
from memory_test.sweep.messages import Exchange, PhaseLine, read_json, write_json

FREE_SHARE = 0.85
"""Share of the free memory that a CPU worker may take, so that the host stays alive."""
_STDERR_LINES = 20
_ROOT = Path(__file__).resolve().parents[2]
_PROBE_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one worker left behind: its header, its answer, or how it died."""

    header: dict[str, Any] | None
    answer: dict[str, Any] | None
    exit_code: int | None
    timed_out: bool
    phase: str | None
    stderr_tail: str


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
        outcomes.append(_work(config, probe=False, timeout_s=config.timeout_s))
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
    outcome = _work(config, probe=True, timeout_s=_PROBE_TIMEOUT_S)
    if outcome.answer is not None and outcome.answer["status"] == "usage":
        raise UsageError(outcome.answer["message"])
    if outcome.header is None:
        reason = outcome.stderr_tail.strip().splitlines()[-1:] or ["no message"]
        raise UsageError(f"worker: cannot start with {sys.executable}: {reason[0]}")
    return Environment(**outcome.header["environment"]), outcome.header["resolved"]


def cell_id(resolved: dict[str, Any], environment: Environment) -> str:
    """Return the identity of a cell: a hash of its resolved configuration and of where it runs."""
    return _digest([_measured_part(resolved), environment.identity()])


def config_digest(resolved: dict[str, Any]) -> str:
    """Return the hash of a resolved configuration alone, for file names."""
    return _digest(_measured_part(resolved))


def _measured_part(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration without the limits, which decide whether there is a number, not which."""
    return {name: value for name, value in resolved.items() if name not in ("timeout_s", "memory_limit_gib")}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


# --- one worker -------------------------------------------------------------------------------------------------


def _work(config: ExperimentConfig, *, probe: bool, timeout_s: float) -> Outcome:
    """Run one worker to its end, whatever that is."""
    limit = _memory_limit(config)
    threads = config.num_threads or default_threads()
    with tempfile.TemporaryDirectory(prefix="memory-test-") as name:
        exchange = Exchange(Path(name))
        request = {
            "config": dataclasses.asdict(config),
            "num_threads": threads,
            "memory_limit_bytes": limit,
            "probe": probe,
        }
        write_json(exchange.request, request)
        with exchange.stderr.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "memory_test.sweep.worker", name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=_environment(threads),
                start_new_session=True,
            )
            timed_out = _wait(process, timeout_s)
        return Outcome(
            header=read_json(exchange.header),
            answer=read_json(exchange.answer),
            exit_code=process.returncode,
            timed_out=timed_out,
            phase=PhaseLine.read(exchange.phase),
            stderr_tail=_tail(exchange.stderr),
        )


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
    """Wait for a worker; kill it and all it started at the time limit or when interrupted."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        return True
    except BaseException:
        _kill(process)
        raise
    return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(threads: int) -> dict[str, str]:
    """Return the worker's environment: threads pinned, this source tree first on its path."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **pinned, "PYTHONPATH": os.pathsep.join(paths), "KINETO_LOG_LEVEL": "99"}


def default_threads() -> int:
    """Return the number of physical cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed))


def _memory_limit(config: ExperimentConfig) -> int:
    if config.memory_limit_gib is not None:
        return int(config.memory_limit_gib * GIB)
    return int(psutil.virtual_memory().available * FREE_SHARE)


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if "profiler_start" not in line and "profiler_stop" not in line]
    text = "\n".join(kept[-_STDERR_LINES:])
    for folder in (sys.prefix, _ROOT):  # a record says nothing about where things lie
        text = text.replace(f"{folder}{os.sep}", "")
    return text


# --- from outcomes to a record ----------------------------------------------------------------------------------


def _record(config: ExperimentConfig, outcomes: list[Outcome]) -> Record:
    """Summarise the repeats of a cell."""
    last = outcomes[-1]
    header = next((o.header for o in outcomes if o.header is not None), None)
    environment = Environment(**header["environment"]) if header else None
    resolved = header["resolved"] if header else config.resolve(device=config.device, num_threads=default_threads())
    status = _status(last)
    answers = [o.answer for o in outcomes if o.answer is not None and o.answer["status"] == "ok"]
    repeats = [_repeat(answer["repeat"]) for answer in answers]
    times = [seconds for repeat in repeats for seconds in repeat.step_times_s]
    complete = status == "ok"
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
        throughput_examples_per_s=config.batch_size / median(times) if complete and times else None,
        phases=_phases(repeats) if complete else {},
        breakdown_bytes=worst.breakdown_bytes if worst else {},
        config_requested=dataclasses.asdict(config),
        config_resolved=resolved,
        choices=answers[-1]["choices"] if answers else {},
        environment=environment,
        timeline=worst.timeline if worst else None,
        failure=None if complete else _failure(last),
        repeats=repeats,
    )


def _status(outcome: Outcome) -> Status:
    if outcome.timed_out:
        return "timeout"
    if outcome.answer is None:
        return "crashed"
    status: str = outcome.answer["status"]
    return "error" if status == "usage" else status  # type: ignore[return-value]


def _failure(outcome: Outcome) -> Failure:
    """Say why there are no numbers."""
    answer = outcome.answer or {}
    code = outcome.exit_code
    if outcome.timed_out:
        message = "the worker took longer than timeout_s and was killed"
    elif outcome.answer is None:
        message = f"the worker died of {_how(code)}"
    else:
        message = answer["message"]
    return Failure(
        phase=outcome.phase,
        message=message,
        requested_bytes=answer.get("requested_bytes"),
        free_bytes=answer.get("free_bytes"),
        limit_bytes=answer.get("limit_bytes"),
        exit_code=code,
        stderr_tail=outcome.stderr_tail,
    )


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the kernel's out-of-memory killer sends it too" if name == "SIGKILL" else ""
    return f"signal {name}{hint}"


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
