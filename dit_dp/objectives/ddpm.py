"""The objective of DiT: noise prediction on a linear DDPM schedule, with learned variances.

Ho, Jain and Abbeel (arXiv 2006.11239) for the path and the noise loss; Nichol and Dhariwal (arXiv 2102.09672)
for the variational term of the variance channels, as DiT (arXiv 2212.09748) trains it.

Shapes: N examples, C input channels, H = W positions a side, S diffusion steps.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.clipping.batch import Batch


class DDPMObjective:
    """Draws training batches and gives their per-example losses.

    Args:
        learn_sigma: Whether the model also predicts variances (2C output channels); adds the variational term.
        class_dropout_prob: Probability that an example's label is dropped, drawn once per example.
        num_steps: S.
    """

    def __init__(self, *, learn_sigma: bool, class_dropout_prob: float = 0.1, num_steps: int = 1000) -> None:
        validate.integer("num_steps", num_steps, minimum=2)
        self.learn_sigma, self.class_dropout_prob, self.num_steps = learn_sigma, class_dropout_prob, num_steps
        scale = 1000 / num_steps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)
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

    def draw(self, x0: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw all randomness of a batch.

        Args:
            x0: (N, C, H, W) clean inputs.
            labels: (N,) class indices.
            generator: Source of randomness on the device of `x0`.

        Returns:
            The batch: ``x0``, ``noise`` and ``x_t`` (N, C, H, W), ``t`` and ``y`` (N,), ``drop_labels`` (N,) bool.
        """
        rows, device = x0.shape[0], x0.device
        t = torch.randint(0, self.num_steps, (rows,), generator=generator, device=device)
        noise = torch.empty_like(x0).normal_(generator=generator)
        drop = torch.rand(rows, generator=generator, device=device) < self.class_dropout_prob
        x_t = self.diffuse(x0, noise, t)
        return {"x0": x0, "noise": noise, "x_t": x_t, "t": t, "y": labels, "drop_labels": drop}

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, (N, C, H, W): the forward process at steps t, (N,)."""
        return self._at("signal", t, x0) * x0 + self._at("noise", t, x0) * noise

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the per-example losses.

        Args:
            model: ``model(x_t, t, y, drop_labels=...)`` gives (N, C or 2C, H, W) and draws nothing at random.
            batch: From `draw`.

        Returns:
            (N,) losses: mean squared error of the noise, plus the variational bound in bits per dimension
            (Nichol and Dhariwal, eq. 15 to 17, its mean held fixed) if variances are learned.
        """
        assert isinstance(batch, Mapping)
        output = model(batch["x_t"], batch["t"], batch["y"], drop_labels=batch["drop_labels"])
        output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
        channels = batch["noise"].shape[1]
        prediction = output[:, :channels]  # (N, C, H, W)
        losses: Tensor = (prediction - batch["noise"]).square().flatten(1).mean(1)  # (N,)
        if self.learn_sigma:
            losses = losses + self._variational(prediction.detach(), output[:, channels:], batch)
        return losses

    def _variational(self, prediction: Tensor, fraction: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the variational term, (N,): KL of the reverse step, or its likelihood at t = 0."""
        x0, x_t, t = batch["x0"], batch["x_t"], batch["t"]
        low, high = self._at("log_variance", t, x0), self._at("log_beta", t, x0)
        fraction = (fraction + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low  # (N, C, H, W)
        x0_hat = (x_t - self._at("noise", t, x0) * prediction) / self._at("signal", t, x0)
        mean = self._posterior_mean(x0_hat, x_t, t)
        kl = 0.5 * (
            log_variance
            - low
            - 1
            + (low - log_variance).exp()
            + (self._posterior_mean(x0, x_t, t) - mean).square() * (-log_variance).exp()
        )
        nll = -_discretized_log_likelihood(x0, mean, 0.5 * log_variance)
        at_end = (t == 0).view(-1, 1, 1, 1)
        bits: Tensor = torch.where(at_end, nll, kl).flatten(1).mean(1) / math.log(2)
        return bits

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self._at("mean_x0", t, x0) * x0 + self._at("mean_xt", t, x0) * x_t

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Return a table's entries at t, (N, 1, 1, 1), in the dtype and on the device of `like`."""
        if self._tables[table].device != t.device:
            self._tables[table] = self._tables[table].to(t.device)
        return self._tables[table][t].to(like.dtype).view(-1, 1, 1, 1)


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
