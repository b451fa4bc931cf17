"""The kernels on a small case under compute-sanitizer: ``python -m memory_test.campaign.sanitize FILE``.

torch's caching allocator is switched off, or reading past a tensor would stay within one of its segments, unnoticed.
"""

import os
import subprocess
import sys
from pathlib import Path

from memory_test.campaign.processes import record_of
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

TOOLS = ("memcheck", "racecheck")
FOUND = 9
"""Exit code that the tool is asked for where it found something."""


def main(path: Path) -> int:
    """Run both tools and write what they said; return 1 if one found something or could not run."""
    check_writable(path)
    runs = []
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
        done = subprocess.run(
            [*command, sys.executable, "-P", "-m", "memory_test.campaign.tune", "check"],
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            errors="replace",
        )
        said = f"{done.stdout}\n{done.stderr}".strip()
        runs.append({"tool": tool, "exit_code": done.returncode, "said": said[-2000:]})
    clean = all(run["exit_code"] == 0 for run in runs)
    write_text(path, record_of(capture("cuda"), clean=clean, runs=runs))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
