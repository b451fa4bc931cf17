"""The learning rate of a step. No torch."""

import math

from dit_dp.trainer.config import TrainConfig


def learning_rate_at(config: TrainConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, the first of which is 1.

    It rises linearly over the warmup, and goes from there to `final_learning_rate` at the last step.
    """
    base: float = config.chosen("learning_rate")
    if step <= config.warmup_steps:
        return base * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return base
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_learning_rate + (base - config.final_learning_rate) * left
