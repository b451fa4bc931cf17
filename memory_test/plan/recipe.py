"""A training recipe as a plan's options: ``memory-test plan --recipe NAME|FILE``."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dit_dp.errors import UsageError
from dit_dp.trainer.config import BUNDLED, TrainConfig
from dit_dp.trainer.recipes import load_recipe, read_recipe, take_option
from dit_dp.workloads import WorkloadConfig


def with_recipe(argv: Sequence[str]) -> list[str]:
    """Return a command line in which ``--recipe`` has become options of `PlanArgs`; those after it win.

    Raises:
        UsageError: There is no such recipe, or the size of its data is not known.
    """
    rest = list(argv)
    name = take_option(rest, "--recipe")
    if name is None:
        return rest
    said = read_recipe(name).get("data")
    config = load_recipe(name, data=said or BUNDLED[-1])
    asked = take_option(list(rest), "--dataset-size")
    size = int(asked) if asked is not None and asked.isdecimal() else _dataset_size(config, said)
    return [*_words(config), *_budget(config, size), *rest]


def _words(config: TrainConfig) -> list[str]:
    """Return model, batch and optimizer."""
    words: list[str] = []
    for field in fields(WorkloadConfig):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        option = f"--{field.name.replace('_', '-')}"
        words += [option] if value is True else [option, *(value if isinstance(value, tuple) else [str(value)])]
    words += ["--batch-size", str(config.batch_size), "--dtype", config.dtype]
    words += ["--optimizer", config.chosen("optimizer")]
    return [*words, *(["--ema"] if config.chosen("ema_decay") else [])]


def _budget(config: TrainConfig, size: int) -> list[str]:
    """Return what the noise multiplier follows from, if the recipe has a budget."""
    if config.epsilon is None:
        return []
    steps = config.steps or math.ceil((config.epochs or 0) * size / config.batch_size)
    values: dict[str, Any] = {"epsilon": config.epsilon, "delta": config.delta, "dataset-size": size, "steps": steps}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _dataset_size(config: TrainConfig, said: str | None) -> int:
    """Return the number of units of bundled data."""
    if said not in BUNDLED:
        fix = "the recipe's data are a folder"
        raise UsageError.for_value("dataset_size", None, "the number of units that are trained on", fix)
    if said == "synthetic":
        return config.num_synthetic
    from dataclasses import replace

    import torch

    from dit_dp.trainer.data import open_data

    counted = replace(config, dry_run=True)  # nothing is written
    return len(open_data(counted, config.spec, config.output_dir, torch.device("cpu")).train)
