"""One step from noise towards data, for each sampler, and the times between which steps are made.

Shapes: N samples, C channels, H x W positions, S steps of training, E evaluations of the model.

With ``alpha, sigma`` at time t and ``alpha', sigma'`` at the next, ``x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z``
is DDIM on any path (arXiv 2010.02502, eq. 12), with ``s^2 = eta^2 (sigma'/sigma)^2 (sigma^2 - (alpha/alpha')^2
sigma'^2)``, which on a DDPM is eta^2 times the posterior's variance. On straight lines, eta = 0 is Euler's step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_dp.objectives import ObjectiveConfig
from dit_dp.objectives.paths import Path
from dit_dp.objectives.times import shifted
from dit_dp.sampling.config import VarianceName

FIRST_TIME = 0.999
"""Where a flow starts whose model predicts noise: at t = 1 the noise says nothing of the data."""


def time_grid(objective: ObjectiveConfig, num_steps: int) -> Tensor:
    """Return the times at which the model is asked, from noise to data, (E,): int64 steps of a DDPM, else float64.

    Args:
        objective: What the model was trained on; its shift moves the times of paths other than a DDPM's.
        num_steps: E, at most S on a DDPM.
    """
    if objective.is_ddpm:
        # The distance as in the reference's `space_timesteps`; a single step stands at the noise, not at the data.
        last = objective.num_steps - 1
        if num_steps == 1:
            return torch.tensor([last])
        return torch.tensor([round(last * place / (num_steps - 1)) for place in range(num_steps - 1, -1, -1)])
    times = shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1], objective.shift)
    return times.clamp(max=FIRST_TIME) if objective.path == "flow" and objective.target == "eps" else times


@dataclass(frozen=True)
class Level:
    """Where on a path a sample stands: ``x = alpha x0 + sigma eps``."""

    alpha: float
    sigma: float


DATA = Level(1.0, 0.0)


def level(path: Path, t: Tensor) -> Level:
    """Return alpha and sigma at one time, ()."""
    like = torch.zeros(1, dtype=torch.float64)
    return Level(path.signal(t.view(1), like).item(), path.noise(t.view(1), like).item())


def ddim_step(
    x0: Tensor, eps: Tensor, here: Level, there: Level, *, eta: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """Return the sample at the next level.

    Args:
        x0: Predicted clean inputs, (N, C, H, W).
        eps: Predicted noise, which with `x0` makes the sample at `here`.
        here: Level of the sample.
        there: Next level.
        eta: Fraction of the posterior's standard deviation that is drawn anew.
        z: Standard normal, (N, C, H, W), where eta > 0.
    """
    if not eta or not there.sigma:
        return there.alpha * x0 + there.sigma * eps
    assert z is not None
    kept = here.alpha / there.alpha
    s = eta * there.sigma / here.sigma * math.sqrt(max(0.0, here.sigma**2 - kept**2 * there.sigma**2))
    return there.alpha * x0 + math.sqrt(max(0.0, there.sigma**2 - s**2)) * eps + s * z


def euler_step(x: Tensor, velocity: Tensor, t: float, next_t: float) -> Tensor:
    """Return ``x + (t' - t) v``, (N, C, H, W)."""
    return x + (next_t - t) * velocity


def ancestral_step(
    x: Tensor,
    x0: Tensor,
    here: Level,
    there: Level,
    *,
    z: Tensor | None,
    variance: VarianceName = "small",
    fraction: Tensor | None = None,
) -> Tensor:
    """Return a draw from the reverse process of the DDPM that has only the levels sampled at.

    Arguments are as in `ddim_step`, and:
        x: The sample at `here`, (N, C, H, W).
        z: Standard normal, (N, C, H, W); not used in the last step, to the data, which gives `x0`.
        variance: ``small``: the posterior's; ``large``: beta; ``learned``: between the two by `fraction`.
        fraction: The model's variance channels, (N, C, H, W): -1 is small, 1 large (arXiv 2102.09672, eq. 15).
    """
    kept = (here.alpha / there.alpha) ** 2
    beta = 1 - kept
    before, after = there.sigma**2, here.sigma**2
    mean = there.alpha * beta / after * x0 + math.sqrt(kept) * before / after * x
    if not there.sigma:
        return mean
    assert z is not None
    small = beta * before / after
    if variance == "learned":
        assert fraction is not None
        share = (fraction + 1) / 2
        return mean + (0.5 * (share * math.log(beta) + (1 - share) * math.log(small))).exp() * z
    return mean + math.sqrt(small if variance == "small" else beta) * z
