"""Time a Poisson draw from 1e6 records and the search for a noise multiplier; write the record to the path given.

A minute or two on one core. The searches are of usual budgets, and of one that takes the accountant long: many steps at
a small rate.
"""

import dataclasses
import json
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch

from dit_dp.privacy import PoissonSampler, noise_multiplier
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

NUM_RECORDS = 10**6
RATES = (0.001, 0.05, 0.5)
DRAWS = 30
BUDGETS: tuple[dict[str, Any], ...] = (
    {"target_epsilon": 8.0, "delta": 1e-6, "sample_rate": 4096 / 1281167, "num_steps": 100_000},
    {"target_epsilon": 8.0, "delta": 1e-6, "sample_rate": 256 / 1281167, "num_steps": 500_000},
    {"target_epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.01, "num_steps": 2_000},
    {"target_epsilon": 10.0, "delta": 1e-5, "sample_rate": 0.5, "num_steps": 1_000},
)


def draws(rate: float) -> dict[str, Any]:
    """Return the times of draws, and the most that Python holds over the first and over all: no epoch adds to it."""
    sampler = PoissonSampler(NUM_RECORDS, sample_rate=rate)
    times, peaks = [], []
    for number in range(DRAWS):
        start = time.perf_counter()
        sampler.draw()
        times.append(time.perf_counter() - start)
        if number in (0, DRAWS - 1):
            tracemalloc.start()
            sampler.draw()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    return {"sample_rate": rate, "seconds": times, "median_s": statistics.median(times), "peak_bytes": peaks}


def search(budget: dict[str, Any]) -> dict[str, Any]:
    """Return a noise multiplier and how long it took."""
    start = time.perf_counter()
    found = noise_multiplier(**budget)
    return {**budget, "noise_multiplier": found, "seconds": time.perf_counter() - start}


def main(path: Path) -> None:
    """Measure and write."""
    check_writable(path)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "schema_version": 1,
        "environment": dataclasses.asdict(capture("cpu")),
        "num_records": NUM_RECORDS,
        "draws": [draws(rate) for rate in RATES],
        "noise_multipliers": [search(budget) for budget in BUDGETS],
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    for row in record["draws"]:
        print(f"draw at {row['sample_rate']}: {1e3 * row['median_s']:.1f} ms, worst {1e3 * max(row['seconds']):.1f}")  # noqa: T201
    for row in record["noise_multipliers"]:
        print(f"{row['num_steps']} steps at {row['sample_rate']:.4f}: {row['seconds']:.1f} s")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
