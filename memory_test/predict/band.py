"""How far off a prediction may be, and who has seen that. Plain data."""

import dataclasses
from typing import Any

from memory_test.core.model_args import PRETRAINED, is_custom
from memory_test.core.schema import ErrorBand
from memory_test.predict.cards import Card

CUDA = ErrorBand(
    peak_allocated=0.005,
    peak_reserved=0.035,
    source="largest error on an H100, 30 small configurations, auto aside; on an emulated one, 75 more, 0.000%",
)
"""The largest of results/h100/prediction, where the same rules were chosen, and of results/prediction/emulator.json."""

NEWEST_TORCH = (2, 13)
"""The table of what CUDA operations take inside is of torch 2.11 to this one."""

CPU = ErrorBand(
    peak_allocated=0.005,
    peak_reserved=None,
    source="largest error against the CPU allocator's true peak, every method, in the tests",
)

RANKS_CUDA = ErrorBand(
    peak_allocated=0.01,
    peak_reserved=None,
    source="one rank's largest error on an emulated runtime and rank 0's of two CPU processes, added; never compared "
    "with several GPUs",
)

RANKS_CPU = ErrorBand(
    peak_allocated=0.005,
    peak_reserved=None,
    source="largest error against rank 0 of two CPU processes, in the tests",
)

RANKS_COVERED = {
    "ddp": "this rank's batch, DDP's buckets, sums all-reduced in place, noise of one parameter at a time",
    "fsdp2": "this rank's batch and shards, gathered weights with the block gathered ahead, buffers of all-gather and "
    "reduce-scatter, sums and noise at full shape of one parameter at a time",
}

RANKS_NOT_COVERED = {
    "ddp": "the time of communication; NCCL's own buffers; DDP's copy of the parameters while it is built (at most "
    "500 MiB)",
    "fsdp2": "the time of communication; NCCL's own buffers; what CUDA reserves more because FSDP2's streams do not "
    "share freed blocks",
}


def of(card: Card | None, resolved: dict[str, Any], torch_version: str) -> ErrorBand:
    """Return the band of a prediction, and what of it the comparison did not see.

    Args:
        card: Where; `None`: the CPU.
        resolved: The configuration.
        torch_version: That predicted.
    """
    several = "sharding" in resolved
    if card is None:
        return RANKS_CPU if several else CPU
    band = RANKS_CUDA if several else CUDA
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    outside = {
        "auto's choice, which is timed on the device": resolved["experiment"] == "auto",
        "a card that is no H100": (card.major, card.minor) != (9, 0),
        "a model of your own": is_custom(resolved["model"], resolved["pretrained"]),
        "a pretrained model": resolved["pretrained"],
        f"the workload {resolved['workload']}": resolved["workload"] not in ("dit", PRETRAINED, None),
        "accumulation": resolved["accumulation"] > 1,
        "the moving average": resolved["ema"],
        f"torch {torch_version}": (major, minor) > NEWEST_TORCH,
    }
    unseen = ", ".join(name for name, here in outside.items() if here)
    return band if not unseen else dataclasses.replace(band, source=f"{band.source}. It did not see: {unseen}")
