"""The process that does one task on one cell: ``python -m memory_test.sweep.worker FOLDER``.

Whatever is caught becomes an answer; what cannot be caught (a signal, a limit) is the runner's to tell.
"""

import ctypes
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from dit_dp.errors import UsageError
from memory_test.sweep.messages import Exchange, PhaseLine, read_json, write_json

_OUT_OF_MEMORY = "can't allocate|bad_alloc|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
_PR_SET_PDEATHSIG = 1
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(folder: Path) -> None:
    """Serve the request in a folder."""
    exchange = Exchange(folder)
    request = read_json(exchange.request)
    line = PhaseLine(exchange.phase)
    line.set("start")
    _die_with_parent()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    limit = request["memory_limit_bytes"]
    try:
        answer = _serve(request, exchange, line, limit)
    except UsageError as error:
        cause = error.__cause__  # what a callable of the user's own raised
        short = cause is not None and _is_out_of_memory(cause)
        answer = _failure(cause, limit) if cause and short else {"status": "usage", "message": str(error)}
    except BaseException as error:  # noqa: BLE001  (the worker's boundary: everything becomes a record)
        answer = _failure(error, limit)
    write_json(exchange.answer, answer)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(request: dict[str, Any], exchange: Exchange, line: PhaseLine, limit: int | None) -> dict[str, Any]:
    """Describe the environment; then, unless only that was asked for, do the task."""
    from memory_test.core.config import ExperimentConfig
    from memory_test.core.environment import capture, default_device

    config = ExperimentConfig(**request["config"])
    device = default_device() if config.device == "auto" else config.device
    if device == "cuda" and default_device() != "cuda":
        raise UsageError.for_value("device", "cuda", "cpu", "no CUDA device can be used here; drop --device or say cpu")
    resolved = config.resolve(device=device, num_threads=request["num_threads"])
    write_json(exchange.header, {"environment": vars(capture(device)), "resolved": resolved})
    if request["task"] == "probe":
        return {"status": "ok"}
    if limit is not None and device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from memory_test.sweep.tasks import TASKS

    return {"status": "ok", **TASKS[request["task"]](resolved, line.set, **request["options"])}


def _failure(error: BaseException, limit: int | None) -> dict[str, Any]:
    """Describe a caught failure; out of memory is told by type and, on the CPU, by the allocator's message."""
    text = " ".join(str(error).split()).split(" If reserved but unallocated")[0]
    name, out_of_memory = type(error).__name__, _is_out_of_memory(error)
    traceback.print_exception(error, file=sys.stderr)
    answer: dict[str, Any] = {
        "status": "oom" if out_of_memory else "error",
        "message": f"{name}: {text[:500]}",
        "requested_bytes": None,
        "free_bytes": None,
        "limit_bytes": None,
    }
    if out_of_memory:
        answer["requested_bytes"] = requested_bytes(text)
        if "CU" in text or name == "OutOfMemoryError":
            import torch

            free, answer["limit_bytes"] = torch.cuda.mem_get_info()
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            answer["free_bytes"] = free + cached
        elif limit is not None:
            answer["free_bytes"], answer["limit_bytes"] = max(0, limit - _data_bytes()), limit
    return answer


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or bool(re.search(_OUT_OF_MEMORY, str(error)))


def requested_bytes(message: str) -> int | None:
    """Return the size of the allocation that failed, from the allocator's message."""
    exact = re.search(r"tried to allocate (\d+) bytes", message)
    if exact:
        return int(exact.group(1))
    rounded = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
    return int(float(rounded.group(1)) * _UNITS[rounded.group(2)]) if rounded else None


def _data_bytes() -> int:
    """Return what counts against the limit: private writable memory."""
    for entry in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if entry.startswith("VmData:"):
            return int(entry.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # skip the teardown of a process whose memory may be at its limit
