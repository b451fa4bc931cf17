"""A training run that writes down, before it goes on, every sample that it draws and all noise that it adds.

Run as a program: ``python -m tests.privacy.witnessed_run FOLDER WITNESS``. Goes on with the run in the folder, if there
is one. Each line of the witness is on the disk before what it tells of can be released.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.ranks import Ranks
from dit_dp.privacy import PoissonSampler
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.run import run

STEPS = 12


def main(folder: str, witness: str) -> None:
    """Train, watched."""
    torch.set_num_threads(1)
    file = Path(witness).open("a", encoding="utf-8")  # noqa: SIM115 - open until the process dies

    def tell(**what: Any) -> None:
        file.write(json.dumps({"process": os.getpid(), **what}) + "\n")
        file.flush()
        os.fsync(file.fileno())

    draw, noise = PoissonSampler.draw, Ranks.noise

    def drawn(self: PoissonSampler, *ranks: int) -> Tensor:
        sample = draw(self, *ranks)
        tell(kind="sample", units=sample.tolist())
        return sample

    def noised(self: Ranks, parameter: nn.Parameter, std: float, generator: torch.Generator) -> Tensor:
        values = noise(self, parameter, std, generator)
        if values.numel() >= 256:
            tell(kind="noise", digest=hashlib.sha256(values.numpy().tobytes()).hexdigest())
        return values

    PoissonSampler.draw, Ranks.noise = drawn, noised  # type: ignore[method-assign]
    config = TrainConfig(
        data="digits",
        in_channels=3,
        image_size=8,
        model="DiT-S/2",
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=10,
        batch_size=16,
        steps=STEPS,
        noise_multiplier=1.0,
        method="bookkeeping",
        num_samples=0,
        checkpoint_every=3,
        log_every=100,
        device="cpu",
        output_dir=Path(folder),
        resume="auto",
    )
    run(config)
    tell(kind="end")


if __name__ == "__main__":
    main(*sys.argv[1:])
