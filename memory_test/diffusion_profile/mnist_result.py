"""Put the runs of ``make mnist`` together: ``mnist_result.py RUNS OUTPUT`` writes OUTPUT/record.json and samples.png.

RUNS has a folder for each run (eps10, inf) with the trainer's folder, ``samples`` and ``accuracy.json``, and
``real.json``, what the real training images reach.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image

from memory_test.core.environment import capture
from memory_test.core.store import write_text

KEPT = (
    "claim",
    "epsilon",
    "delta",
    "noise_multiplier",
    "sample_rate",
    "steps",
    "num_units",
    "seconds",
    "step_time_s",
    "peak_memory_bytes",
    "peak_memory_is",
    "num_trainable_parameters",
    "method",
    "num_threads",
)
TITLES = {"eps10": "ε = 10, δ = 1e-5", "inf": "no noise"}


def result_of(folder: Path) -> dict[str, Any]:
    """Return what a run and its samples came to."""
    (run,) = (path for path in folder.iterdir() if path.name[:3].isdigit())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    kept = {name: summary[name] for name in KEPT}
    rate = summary["sample_rate"] * summary["num_units"] / summary["step_time_s"]
    accuracy = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return {**kept, "examples_per_s": rate, "config": config, "accuracy": accuracy}


def main(runs: Path, output: Path) -> None:
    """Write the record and the picture."""
    output.mkdir(parents=True, exist_ok=True)
    found = {name: result_of(runs / name) for name in TITLES}
    real = json.loads((runs / "real.json").read_text(encoding="utf-8"))
    record = {"schema_version": 1, "environment": dataclasses.asdict(capture("cpu")), "runs": found, "real": real}
    write_text(output / "record.json", json.dumps(record, indent=1) + "\n")
    figure, axes = plt.subplots(1, len(TITLES), figsize=(4 * len(TITLES), 4.3), dpi=150)
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        axis.imshow(Image.open(runs / name / "samples" / "grid.png"), cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(output / "samples.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
