"""Where a measurement ran: device, versions, allocator, commit. Read once, in the worker."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import psutil
import torch

from memory_test.core.schema import Environment

COMMIT_VARIABLE = "MEMORY_TEST_COMMIT"
"""Environment variable: the commit, 40 hexadecimal digits, of a source tree that has no ``.git``."""

_PACKAGES = ("opacus", "diffusers", "numpy", "triton")


def capture(device: str) -> Environment:
    """Describe this process's machine and software.

    Args:
        device: ``cuda`` (the current device) or ``cpu``.
    """
    commit, changes = _commit()
    common = {
        "torch_version": torch.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "python_version": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_model": cpu_model(),
        "num_cpus": psutil.cpu_count(logical=True) or 1,
        "total_memory_bytes": psutil.virtual_memory().total,
        "commit": commit,
        "dirty": None if commit is None else changes is not None,
        "changes": changes,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Environment(
            device_type="cuda",
            device_name=properties.name,
            device_memory_bytes=properties.total_memory,
            driver_version=_driver_version(),
            cuda_version=torch.version.cuda,
            cudnn_version=str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            allocator=_cuda_allocator(),
            **common,  # type: ignore[arg-type]
        )
    return Environment(
        device_type="cpu",
        device_name=cpu_model(),
        device_memory_bytes=psutil.virtual_memory().total,
        allocator=_cpu_allocator(),
        **common,  # type: ignore[arg-type]
    )


def default_device() -> str:
    """Return ``cuda`` if a CUDA device can be used, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def cpu_model() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_allocator() -> dict[str, str]:
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default"
    return {"backend": torch.cuda.memory.get_allocator_backend(), "settings": settings}


def _cpu_allocator() -> dict[str, str]:
    return {"backend": "cpu", "preload": Path(os.environ.get("LD_PRELOAD", "") or "none").name}


def _driver_version() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001  (NVML raises its own hierarchy, and the library may be absent)
        return None


def _commit() -> tuple[str | None, str | None]:
    """Return the commit of the source tree this package runs from, and a digest of its changes.

    A copy of the tree without its history is told its commit by `COMMIT_VARIABLE`; such a copy must be unchanged.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        said = os.environ.get(COMMIT_VARIABLE, "")
        return (said if re.fullmatch(r"[0-9a-f]{40}", said) else None), None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "diff", "HEAD", "--", "dit_dp", "memory_test")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, hashlib.sha256(changed.encode()).hexdigest()[:16] if changed else None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
