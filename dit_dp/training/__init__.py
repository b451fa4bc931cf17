"""Training: the step that measuring, training and predicting share, and what trains when.

Names are resolved on first use, so that reading `dit_dp.training.schedule` does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.lazy import lazily
from dit_dp.training.schedule import PRESETS, Phase, Schedule

if TYPE_CHECKING:
    from dit_dp.training.ema import Ema
    from dit_dp.training.phases import PhaseRunner
    from dit_dp.training.step import make_optimizer, train_step

_LAZY = {
    "Ema": "dit_dp.training.ema",
    "PhaseRunner": "dit_dp.training.phases",
    "make_optimizer": "dit_dp.training.step",
    "train_step": "dit_dp.training.step",
}

__all__ = ["PRESETS", "Ema", "Phase", "PhaseRunner", "Schedule", "make_optimizer", "train_step"]


__getattr__ = lazily(__name__, _LAZY)
