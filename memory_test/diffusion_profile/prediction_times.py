"""Time predictions of DiT-XL/2 by every method, and a plan, each as a command; write the record to the path given.

Seconds from start to end, imports included, and the largest resident memory of the process; three minutes on 2 cores
that do nothing else.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dit_dp.clipping.registry import METHODS
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

CELL = ("--model", "DiT-XL/2", "--batch-size", "32", "--dtype", "bf16")
LEFT_OUT = ("microbatch", "ghost_fsdp_bk")
"""One example's memory and as many steps as examples; what needs shards."""


def command(*words: str) -> dict[str, Any]:
    """Run a command of memory-test and return what it took.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen((sys.executable, "-m", "memory_test.cli", *words), stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode not in (0, 1):  # 1: it does not fit, which is an answer
            said.seek(0)
            raise RuntimeError(f"memory-test {' '.join(words)}: {said.read().decode().strip()[-500:]}")
    return {"command": ["memory-test", *words], "seconds": seconds, "peak_resident_bytes": 1024 * used.ru_maxrss}


def main(path: Path) -> None:
    """Measure and write."""
    check_writable(path)
    methods = [name for name, method in METHODS.items() if method.supports_autocast and name not in LEFT_OUT]
    record: dict[str, Any] = {
        "schema_version": 1,
        "environment": dataclasses.asdict(capture("cpu")),
        "predictions": [command("predict", "--experiment", method, *CELL) for method in methods],
        "plan": command("plan", "--model", "DiT-XL/2", "--dtype", "bf16", "--batch-size", "4096", "--gpu", "24GB"),
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    for row in (*record["predictions"], record["plan"]):
        print(*row["command"][1:4], f"{row['seconds']:.1f} s, {row['peak_resident_bytes'] / 2**20:.0f} MiB")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
