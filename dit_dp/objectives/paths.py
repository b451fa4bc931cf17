"""From data to noise: ``x_t = alpha x0 + sigma eps``, and what each of x0, eps and v says of the others.

Shapes: N rows, S steps. The velocity is ``v = a x0 + b eps`` with ``alpha b - sigma a = 1`` on every path, so that
``x0 = b x_t - sigma v`` and ``eps = alpha v - a x_t``.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dit_dp.objectives.config import ObjectiveConfig, TargetName


class Path(ABC):
    """Coefficients by time; what they are multiplied with has N rows, and so have they."""

    @abstractmethod
    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """Return alpha at times t (N,), in the dtype of `like` and of as many dimensions."""

    @abstractmethod
    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        """Return sigma."""

    @abstractmethod
    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return v."""

    @abstractmethod
    def _of_velocity(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b."""

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t."""
        return self.signal(t, x0) * x0 + self.noise(t, x0) * eps

    def target(self, name: TargetName, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the model has to predict."""
        if name == "v":
            return self.velocity(x0, eps, t)
        return eps if name == "eps" else x0

    def to_x0(self, name: TargetName, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the x0 that a prediction of a target says; of eps there is none where alpha is 0."""
        if name == "eps":
            return (x_t - self.noise(t, x_t) * prediction) / self.signal(t, x_t)
        if name == "v":
            return self._of_velocity(t, x_t)[1] * x_t - self.noise(t, x_t) * prediction
        return prediction

    def to_eps(self, name: TargetName, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the eps that a prediction of a target says; of x0 there is none where sigma is 0."""
        if name == "x0":
            return (x_t - self.signal(t, x_t) * prediction) / self.noise(t, x_t)
        if name == "v":
            return self.signal(t, x_t) * prediction - self._of_velocity(t, x_t)[0] * x_t
        return prediction


class Diffusion(Path):
    """The DDPM process (Ho et al., arXiv 2006.11239) at steps 0 ... S - 1.

    Args:
        num_steps: S.
        cosine: The schedule of Nichol and Dhariwal (arXiv 2102.09672, eq. 17), else betas from 1e-4 to 0.02 in equal
            steps, both times 1000 / S.
    """

    def __init__(self, num_steps: int, *, cosine: bool = False) -> None:
        self.num_steps = num_steps
        betas = _cosine_betas(num_steps) if cosine else _linear_betas(num_steps)
        alphas = 1 - betas
        signal = alphas.cumprod(0)  # alpha-bar
        previous = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        variance = betas * (1 - previous) / (1 - signal)  # of the posterior q(x_{t-1} | x_t, x_0)
        self._tables = {
            "signal": signal.sqrt(),
            "noise": (1 - signal).sqrt(),
            "log_beta": betas.log(),
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
            "mean_x0": betas * previous.sqrt() / (1 - signal),
            "mean_xt": (1 - previous) * alphas.sqrt() / (1 - signal),
        }

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Return a table's entries at t, (N, 1, ...), in the dtype and on the device of `like`.

        Args:
            table: ``signal``, ``noise``, ``log_beta``, ``log_variance`` (of the posterior), ``mean_x0`` or
                ``mean_xt`` (the posterior mean's coefficients).
            t: Steps, (N,).
            like: Sets dtype and number of dimensions.
        """
        self._tables[table] = self._tables[table].to(t.device)
        return _column(self._tables[table][t].to(like.dtype), like)

    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """Return ``sqrt(abar)``."""
        return self.at("signal", t, like)

    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        """Return ``sqrt(1 - abar)``."""
        return self.at("noise", t, like)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return ``sqrt(abar) eps - sqrt(1 - abar) x0`` (Salimans and Ho, arXiv 2202.00512)."""
        return self.signal(t, x0) * eps - self.noise(t, x0) * x0

    def _of_velocity(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return -self.noise(t, like), self.signal(t, like)


class Flow(Path):
    """Straight lines from data at t = 0 to noise at t = 1 (rectified flow, arXiv 2209.03003)."""

    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """Return ``1 - t``."""
        return _column((1 - t).to(like.dtype), like)

    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        """Return t."""
        return _column(t.to(like.dtype), like)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return ``eps - x0``."""
        return eps - x0

    def _of_velocity(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(self.noise(t, like))
        return -one, one


class Additive(Path):
    """Noise added to data that stay as they are: ``x0 + t eps``."""

    def signal(self, t: Tensor, like: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(self.noise(t, like))

    def noise(self, t: Tensor, like: Tensor) -> Tensor:
        """Return t."""
        return _column(t.to(like.dtype), like)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return eps."""
        return eps

    def _of_velocity(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(self.noise(t, like))
        return 0 * one, one


def make_path(config: ObjectiveConfig) -> Path:
    """Return the path that a configuration names."""
    if config.is_ddpm:
        return Diffusion(config.num_steps, cosine=config.path == "ddpm-cosine")
    return Flow() if config.path == "flow" else Additive()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return (N,) as (N, 1, ...), of as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _linear_betas(num_steps: int) -> Tensor:
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def _cosine_betas(num_steps: int) -> Tensor:
    steps = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = torch.cos((steps + 0.008) / 1.008 * math.pi / 2).square()  # alpha-bar, up to a factor
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
