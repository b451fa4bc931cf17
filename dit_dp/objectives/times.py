"""At which times a model is trained.

Esser et al. (arXiv 2403.03206) for logit-normal times and the shift.
"""

import torch
from torch import Tensor

from dit_dp.objectives.config import ObjectiveConfig


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return ``s t / (1 + (s - 1) t)``: 0 and 1 stay, times between move to 1 for s > 1."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def draw_times(
    config: ObjectiveConfig, count: int, *, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Draw times.

    Args:
        config: Says from which distribution.
        count: N.
        device: Where.
        dtype: Of continuous times.
        generator: Source of randomness on the device.

    Returns:
        (N,): steps 0 ... S - 1, int64, on a DDPM path; else times in [0, 1].
    """
    if config.times == "uniform" and config.shift == 1 and config.is_ddpm:
        return torch.randint(0, config.num_steps, (count,), generator=generator, device=device)
    if config.times == "uniform":
        t = torch.rand(count, generator=generator, device=device, dtype=dtype)
    else:
        normal = torch.randn(count, generator=generator, device=device, dtype=dtype)
        t = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    t = shifted(t, config.shift)
    return (t * config.num_steps).long().clamp(max=config.num_steps - 1) if config.is_ddpm else t
