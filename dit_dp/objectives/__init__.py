"""What a diffusion model is trained on: one loss per example, all randomness drawn before the forward."""

from dit_dp.objectives.ddpm import DDPMObjective

__all__ = ["DDPMObjective"]
