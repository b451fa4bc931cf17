"""One worker process: started with a request, waited for or killed, its end told as an outcome."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import psutil

from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import Failure, Status
from memory_test.core.units import GIB
from memory_test.sweep.messages import Exchange, PhaseLine, read_json, write_json

Task = Literal["probe", "measure", "turns", "memory", "oracle", "gradient_error"]
"""What a worker does; `probe` only describes the environment, the others are functions of `tasks`."""

FREE_SHARE = 0.85
"""Share of the free memory that a CPU worker may take, so that the host stays alive."""
_STDERR_LINES = 20
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one worker left behind: its header, its answer, or how it died."""

    header: dict[str, Any] | None
    answer: dict[str, Any] | None
    exit_code: int | None
    timed_out: bool
    phase: str | None
    stderr_tail: str

    @property
    def status(self) -> Status:
        """How it ended; the user's mistake, if it was one, counts as an error."""
        if self.timed_out:
            return "timeout"
        if self.answer is None:
            return "crashed"
        status: str = self.answer["status"]
        return "error" if status == "usage" else status  # type: ignore[return-value]

    def failure(self) -> Failure:
        """Say why there are no numbers."""
        answer = self.answer or {}
        if self.timed_out:
            message = "the worker took longer than timeout_s and was killed"
        elif self.answer is None:
            message = f"the worker died of {_how(self.exit_code)}"
        else:
            message = answer["message"]
        return Failure(
            phase=self.phase,
            message=message,
            requested_bytes=answer.get("requested_bytes"),
            free_bytes=answer.get("free_bytes"),
            limit_bytes=answer.get("limit_bytes"),
            exit_code=self.exit_code,
            stderr_tail=self.stderr_tail,
        )


class Worker:
    """A running worker; a context that leaves neither the process nor its folder behind.

    Args:
        config: What it is about.
        task: What it does.
        options: Arguments of the task, JSON-ready.
        pass_fds: File descriptors it inherits.
        variables: Environment variables it has beside this process's, such as the allocator's options.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        task: Task,
        options: Mapping[str, Any] | None = None,
        pass_fds: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        threads = config.num_threads or default_threads()
        self._folder = tempfile.TemporaryDirectory(prefix="memory-test-")
        self._exchange = Exchange(Path(self._folder.name))
        self._timed_out = False
        request = {
            "task": task,
            "config": config.as_dict(),
            "num_threads": threads,
            "memory_limit_bytes": _memory_limit(config),
            "options": dict(options or {}),
        }
        write_json(self._exchange.request, request)
        with self._exchange.stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "memory_test.sweep.worker", self._folder.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**_environment(config, threads), **(variables or {})},
                start_new_session=True,
                pass_fds=tuple(pass_fds),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()
        self._folder.cleanup()

    def wait(self, timeout_s: float) -> Outcome:
        """Wait for its end, kill it and all it started at the time limit (s), and say what came of it."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._timed_out = True
            self._kill()
        return Outcome(
            header=read_json(self._exchange.header),
            answer=read_json(self._exchange.answer),
            exit_code=self._process.returncode,
            timed_out=self._timed_out,
            phase=PhaseLine.read(self._exchange.phase),
            stderr_tail=_tail(self._exchange.stderr),
        )

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def work(
    config: ExperimentConfig,
    task: Task,
    options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run one worker to its end, whatever that is; arguments as for `Worker`, default limit the configuration's."""
    with Worker(config, task, options, variables=variables) as worker:
        return worker.wait(config.timeout_s if timeout_s is None else timeout_s)


def default_threads() -> int:
    """Return the number of physical cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed))


def _environment(config: ExperimentConfig, threads: int) -> dict[str, str]:
    """Return the worker's environment: threads pinned, this source tree first on its path.

    A model of the user's own is looked for in the working directory too, if this process would find it there.
    """
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = str(Path.cwd())
    if config.is_custom and {"", here} & set(sys.path):
        paths.append(here)
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **pinned, "PYTHONPATH": os.pathsep.join(paths), "KINETO_LOG_LEVEL": "99"}


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


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the kernel's out-of-memory killer sends it too" if name == "SIGKILL" else ""
    return f"signal {name}{hint}"
