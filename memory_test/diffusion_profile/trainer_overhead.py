"""Time the trainer's step against the bare engine step of the same model, in turns; write the record to the path given.

The trainer's step draws units and batches, charges the ledger on the disk, sets the learning rate and keeps the moving
average; every tenth writes a line of the log, for which the accountant is asked when it is its turn; no checkpoint is
due. The bare step is forward, backward, clipping, noise and update on a batch that is there. DiT-S/2 at 256 tokens,
8 examples, one thread; some minutes. The median of paired ratios is that of the common step; what few steps cost is in
the ratio of total times.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.run import Run
from dit_dp.trainer.world import join_world
from dit_dp.training import train_step
from memory_test.compare.ratios import paired
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

ROUNDS = 40
BATCH = 8
NOISE = 10.0


def config(folder: Path) -> TrainConfig:
    """Return what is trained: Poisson samples at rate 1: both contenders see the same examples."""
    return TrainConfig(
        model="DiT-S/2",
        depth=6,
        image_size=32,
        in_channels=3,
        num_classes=10,
        data="synthetic",
        num_synthetic=BATCH,
        method="bookkeeping",
        batch_size=BATCH,
        steps=10 * ROUNDS,
        noise_multiplier=NOISE,
        log_every=10,
        checkpoint_every=10 * ROUNDS,
        num_samples=0,
        device="cpu",
        output_dir=folder,
    )


def trainer_steps(folder: Path) -> Iterator[int]:
    """Take a step of a run, with all that the run does for it, at each turn."""
    yield from Run(config(folder), join_world("cpu")).steps()


def bare_step(folder: Path) -> Callable[[], None]:
    """Return the engine's step alone, on a batch that is there."""
    run = Run(config(folder), join_world("cpu"))
    trainer = run.start()
    batch = next(iter(trainer.feed.batches(1)))

    def step() -> None:
        train_step(
            trainer.runner.engine,
            trainer.runner.optimizer,
            trainer.objective,
            [batch],
            noise_multiplier=NOISE,
            expected_batch_size=BATCH,
        )

    return step


def main(path: Path) -> None:
    """Measure and write."""
    check_writable(path)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"bare": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        steps, bare = trainer_steps(Path(folder) / "trainer"), bare_step(Path(folder) / "bare")
        turns: dict[str, Callable[[], object]] = {"bare": bare, "trainer": lambda: next(steps)}
        for number in range(-2, ROUNDS):
            for name in sorted(turns, reverse=bool(number % 2)):
                start = time.perf_counter()
                turns[name]()
                if number >= 0:
                    times[name].append(time.perf_counter() - start)
    spread, totals = paired(times["trainer"], times["bare"]), sum(times["trainer"]) / sum(times["bare"])
    record = {"schema_version": 2, "environment": dataclasses.asdict(capture("cpu"))}
    record |= {"ratio": dataclasses.asdict(spread), "ratio_of_totals": totals, "step_times_s": times}
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"trainer over bare step: {spread.median:.3f} [{spread.q1:.3f}, {spread.q3:.3f}]; total {totals:.3f}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
