"""Training: the step that measuring, training and predicting share."""

from dit_dp.training.ema import Ema
from dit_dp.training.step import make_optimizer, train_step

__all__ = ["Ema", "make_optimizer", "train_step"]
