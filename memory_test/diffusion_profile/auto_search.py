"""Compare what `auto` chooses with every other plan, on three small models; write the record to the path given.

About ten minutes on one core; ``make auto-search`` writes results/auto_search/record.json.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from memory_test.compare.search import search
from memory_test.core.config import ExperimentConfig
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

SIZES: dict[str, dict[str, Any]] = {
    "width 192, 2 blocks, T=256, N=4": {"hidden_size": 192, "num_heads": 4, "depth": 2, "image_size": 256},
    "width 512, 2 blocks, T=64, N=4": {"hidden_size": 512, "num_heads": 8, "depth": 2, "image_size": 128},
    "width 96, 2 blocks, T=256, N=8": {
        "hidden_size": 96,
        "num_heads": 4,
        "depth": 2,
        "image_size": 256,
        "batch_size": 8,
    },
}
BUDGETS = (None, 0.9, 0.75, 0.5)


def main(path: Path) -> None:
    """Search and write."""
    check_writable(path)
    found = {}
    for name, sizes in SIZES.items():
        settings = {"experiment": "auto", "model": "DiT-S/2", "batch_size": 4, "num_threads": 1, **sizes}
        found[name] = [dataclasses.asdict(f) for f in search(ExperimentConfig(device="cpu", **settings), BUDGETS)]
        print(name, *(f"{f['ratio']:.3f}" for f in found[name]))  # noqa: T201
    record = {"schema_version": 1, "environment": dataclasses.asdict(capture("cpu")), "found": found}
    write_text(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
