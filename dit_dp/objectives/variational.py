"""The variational bound of a DDPM, which trains learned variances (Nichol and Dhariwal, arXiv 2102.09672, eq. 15-17).

Shapes: N rows, C channels, H x W positions.
"""

import math

import torch
from torch import Tensor

from dit_dp.objectives.paths import Diffusion


def variational_bound(path: Diffusion, x0_hat: Tensor, fraction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return one term of the bound, in bits per dimension.

    Args:
        path: The process.
        x0_hat: The model's x0, (N, C, H, W), detached where its mean is not to be trained.
        fraction: The model's variance channels, (N, C, H, W): -1 is the posterior's log-variance, 1 log beta.
        x0: Clean inputs, (N, C, H, W).
        x_t: Noisy inputs, (N, C, H, W).
        t: Steps, (N,).

    Returns:
        (N,): KL of the reverse step from the posterior, or the negative log-likelihood of 8-bit data at t = 0.
    """
    low, high = path.at("log_variance", t, x0), path.at("log_beta", t, x0)
    fraction = (fraction + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low  # (N, C, H, W)
    mean = _posterior_mean(path, x0_hat, x_t, t)
    kl = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + (_posterior_mean(path, x0, x_t, t) - mean).square() * (-log_variance).exp()
    )
    nll = -_discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    at_end = (t == 0).view(-1, 1, 1, 1)
    bits: Tensor = torch.where(at_end, nll, kl).flatten(1).mean(1) / math.log(2)
    return bits


def _posterior_mean(path: Diffusion, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return path.at("mean_x0", t, x0) * x0 + path.at("mean_xt", t, x0) * x_t


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-probability of the 8-bit bin around x in [-1, 1] under a Gaussian, elementwise."""
    centred, inverse = x - mean, (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    tiny = 1e-12
    inside = (upper - lower).clamp(min=tiny).log()
    below, above = upper.clamp(min=tiny).log(), (1 - lower).clamp(min=tiny).log()
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the standard normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
