"""What a diffusion model is trained on: one loss per privacy unit, all randomness drawn before the forward.

Names are resolved on first use, so that reading `dit_dp.objectives.config` does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.lazy import lazily
from dit_dp.objectives.config import METRICS, PATHS, TARGETS, TIMES, ObjectiveConfig, shift_for

if TYPE_CHECKING:
    from dit_dp.objectives.ddpm import DDPMObjective
    from dit_dp.objectives.objective import Objective

_LAZY = {"DDPMObjective": "dit_dp.objectives.ddpm", "Objective": "dit_dp.objectives.objective"}

__all__ = [
    "METRICS",
    "PATHS",
    "TARGETS",
    "TIMES",
    "DDPMObjective",
    "Objective",
    "ObjectiveConfig",
    "shift_for",
]


__getattr__ = lazily(__name__, _LAZY)
