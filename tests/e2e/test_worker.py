"""Workers that end well, badly, or not by themselves: each leaves a record."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.core.config import ExperimentConfig
from memory_test.sweep.messages import Exchange, PhaseLine
from memory_test.sweep.runner import cell_id, probe, run_cell
from memory_test.sweep.worker import requested_bytes


def config(**changes: Any) -> ExperimentConfig:
    """Return a cell that takes a few seconds, start included."""
    sizes = {"model": "DiT-S/2", "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 64, "num_threads": 1}
    return ExperimentConfig(**{"experiment": "vanilla", "num_iter": 1, "warmup": 0, **sizes, **changes})


def children() -> list[int]:
    """Return the worker processes below this one."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile, as a worker's call to git does
            if "memory_test.sweep.worker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def kill_when_measuring(found: list[int]) -> None:
    """Send SIGKILL to the first worker that says it is timing."""
    import psutil

    for _ in range(2400):
        for pid in children():
            try:
                exchange = Exchange(Path(psutil.Process(pid).cmdline()[-1]))
                phase = PhaseLine.read(exchange.phase)
            except (psutil.Error, OSError, IndexError):
                continue
            if phase is not None and phase.startswith("timing:"):
                os.kill(pid, signal.SIGKILL)
                found.append(pid)
                return
        time.sleep(0.05)


def test_a_cell_is_measured_in_its_own_process(tmp_path: Path) -> None:
    record = run_cell(config(repeats=2))
    assert record.status == "ok"
    assert len(record.repeats) == 2
    assert record.step_times_s == [t for r in record.repeats for t in r.step_times_s]
    assert record.peak_allocated_bytes == max(r.peak_allocated_bytes or 0 for r in record.repeats)
    assert record.environment is not None
    assert record.cell_id == cell_id(record.config_resolved, record.environment)
    assert record.config_requested["image_size"] == 64
    assert record.config_resolved["num_tokens"] == 16
    store.save(record, tmp_path / "r.json")
    assert store.load(tmp_path / "r.json") == record


def test_a_killed_worker_leaves_a_record() -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_when_measuring, args=(killed,))
    killer.start()
    record = run_cell(config(num_iter=100_000))
    killer.join()
    assert killed
    assert record.status == "crashed"
    assert record.failure is not None
    assert "SIGKILL" in record.failure.message
    assert record.failure.exit_code == -signal.SIGKILL
    assert record.failure.phase is not None
    assert record.failure.phase.startswith("timing:")
    assert record.environment is not None
    assert record.peak_allocated_bytes is None


def test_a_memory_limit_gives_an_oom_record() -> None:
    record = run_cell(config(batch_size=4096, image_size=256, memory_limit_gib=1.5))
    assert record.status == "oom"
    assert record.failure is not None
    assert record.failure.phase == "timing: forward"
    assert record.failure.limit_bytes == int(1.5 * 2**30)
    assert record.failure.requested_bytes is not None
    assert record.failure.free_bytes is not None
    assert record.failure.requested_bytes > record.failure.free_bytes
    assert record.step_times_s == []
    assert record.throughput_examples_per_s is None


def test_a_time_limit_gives_a_timeout_record() -> None:
    record = run_cell(config(num_iter=100_000, timeout_s=6.0))
    assert record.status == "timeout"
    assert record.failure is not None
    assert "timeout_s" in record.failure.message
    assert children() == []


def test_the_workers_usage_error_reaches_the_user() -> None:
    wrong = config(pretrained=True, model="/no/such/folder", depth=None, hidden_size=None, num_heads=None)
    with pytest.raises(UsageError, match="existing folder"):
        run_cell(wrong)
    record = run_cell(wrong, usage_is_error=True)
    assert record.status == "error"
    assert record.failure is not None
    assert "existing folder" in record.failure.message


def test_probe_measures_nothing() -> None:
    environment, resolved = probe(config())
    assert environment.device_type == resolved["device"]
    assert environment.torch_version


def test_two_environments_are_two_cells() -> None:
    import dataclasses

    environment, resolved = probe(config())
    other = dataclasses.replace(environment, torch_version="0.0")
    assert cell_id(resolved, environment) != cell_id(resolved, other)
    assert cell_id(resolved, environment) == cell_id(resolved, dataclasses.replace(environment, dirty=True))


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 301989888 bytes. Error", 301989888),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total", int(2.5 * 2**30)),
        ("std::bad_alloc", None),
    ],
)
def test_requested_bytes(message: str, size: int | None) -> None:
    assert requested_bytes(message) == size


def test_the_worker_is_not_started_by_importing_it() -> None:
    done = subprocess.run([sys.executable, "-c", "import memory_test.sweep.worker"], check=False)
    assert done.returncode == 0
