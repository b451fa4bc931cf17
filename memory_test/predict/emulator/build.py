"""Builds the emulated CUDA runtime, and says how a process is started on it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("runtime.c")
ROOT = Path(__file__).resolve().parents[3]
LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Emulator:
    """An interpreter with torch's CUDA build, and the runtime that goes under it.

    Attributes:
        python: The interpreter.
        library: The runtime.
    """

    python: Path
    library: Path

    def environment(self, **settings: object) -> dict[str, str]:
        """Return a process's environment: the runtime under it, one thread, and more variables."""
        own = {"LD_PRELOAD": self.library, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": 0}
        return {**os.environ, **{name: str(value) for name, value in {**own, **settings}.items()}}


def build(python: Path, folder: Path) -> Emulator:
    """Compile the runtime against the headers that came with torch.

    Args:
        python: Of the environment with torch's CUDA build.
        folder: Where the library goes.
    """
    python = python.absolute()  # not resolved: a virtual environment's interpreter is a link
    folder.mkdir(parents=True, exist_ok=True)
    library = folder.absolute() / LIBRARY
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    includes = [packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include"]
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", *(f"-I{path}" for path in includes)]
    command += [f"-Wl,-soname,{LIBRARY}", str(SOURCE), "-o", str(library), "-lpthread", "-ldl"]
    subprocess.run(command, check=True)
    return Emulator(python, library)
