"""The objective of DiT (arXiv 2212.09748): noise prediction on a linear DDPM schedule, with learned variances."""

from dit_dp.objectives.config import ObjectiveConfig
from dit_dp.objectives.objective import Objective


class DDPMObjective(Objective):
    """`Objective` with DiT's choices: one draw an image, eps, squared error, uniform steps.

    Args:
        learn_sigma: Whether the model also predicts variances (2C output channels); adds the variational term.
        class_dropout_prob: Probability that an example's label is dropped, drawn once per example.
        num_steps: S.
    """

    def __init__(self, *, learn_sigma: bool, class_dropout_prob: float = 0.1, num_steps: int = 1000) -> None:
        super().__init__(
            ObjectiveConfig(learn_sigma=learn_sigma, class_dropout_prob=class_dropout_prob, num_steps=num_steps)
        )
