"""What a model says of a noisy sample, with classifier-free guidance.

Shapes: N samples, C channels, H x W positions, M images of a set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit_dp.objectives import ObjectiveConfig
from dit_dp.sampling.config import GuideChannels


@dataclass(frozen=True)
class Condition:
    """What N samples are drawn under.

    Attributes:
        labels: (N,) int64, of a model of images.
        context: (N, M - 1, C, H, W), the given images of each sample's set.
        context_noise: (N, *context_shape), of a variational set model.
    """

    labels: Tensor | None = None
    context: Tensor | None = None
    context_noise: Tensor | None = None


class Denoiser:
    """Asks a model for its prediction and, where it has some, its variances.

    Args:
        model: As `Objective` calls it; takes inputs in the dtype of its parameters.
        objective: What it was trained on.
        cfg_scale: 1: the model runs once; else label and null label run as one batch of twice the rows.
        guide_channels: ``all`` channels of the prediction, or the first ``3``.
    """

    def __init__(
        self, model: nn.Module, objective: ObjectiveConfig, *, cfg_scale: float, guide_channels: GuideChannels
    ) -> None:
        self.model, self.objective = model, objective
        self.cfg_scale, self.guide_channels = cfg_scale, guide_channels
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Return the prediction and the variance channels, (N, C, H, W) each, in the dtype of x.

        Args:
            x: Noisy samples, (N, C, H, W).
            t: One time for all of them, ().
            condition: Of the samples.
        """
        ask = self._run if self.cfg_scale == 1 else self._guided
        output = ask(x, t, condition).to(x.dtype)
        channels = x.shape[1]
        return output[:, :channels], output[:, channels:] if self.objective.learn_sigma else None

    def _guided(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the output under the label, its guided channels moved away from that under none."""
        assert condition.labels is not None
        twice = Condition(labels=condition.labels.repeat(2))
        drop = torch.arange(2 * len(x), device=x.device) >= len(x)
        output = self._run(x.repeat(2, 1, 1, 1), t, twice, drop).to(x.dtype)
        labelled, null = output.chunk(2)  # (N, C or 2C, H, W) each
        guided = x.shape[1] if self.guide_channels == "all" else min(3, x.shape[1])
        moved = null[:, :guided] + self.cfg_scale * (labelled[:, :guided] - null[:, :guided])
        return torch.cat([moved, labelled[:, guided:]], dim=1)

    def _run(self, x: Tensor, t: Tensor, condition: Condition, drop: Tensor | None = None) -> Tensor:
        """Return the model's output, without a KL divergence."""
        times = (t * self.objective.scale_of_times if self.objective.scale_of_times != 1 else t).to(x.device)
        times = times if times.dtype == torch.int64 else times.to(torch.promote_types(self.dtype, torch.float32))
        count, x = len(x), x.to(self.dtype)
        if condition.context is None:
            output = self.model(x, times.expand(count), condition.labels, drop_labels=drop)
        else:
            # A set model's rows are whole sets; what fills the last one up is not looked at.
            assert self.objective.set_size is not None
            rows = torch.arange(-(-count // self.objective.set_size) * self.objective.set_size, device=x.device)
            rows = rows.clamp(max=count - 1)
            noise = condition.context_noise
            noise = None if noise is None else noise[rows].to(self.dtype)
            output = self.model(x[rows], times.expand(len(rows)), condition.context[rows].to(self.dtype), noise)
        output = output[0] if isinstance(output, tuple) else output
        result: Tensor = output[:count]
        return result
