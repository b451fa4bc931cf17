"""An exponential moving average of what trains, in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dit_dp.errors import UsageError


class Ema:
    """Average of parameters: after each step, ``average = decay * average + (1 - decay) * parameter``.

    Args:
        parameters: What is averaged, such as `Engine.parameters`: frozen ones have no average.
        decay: In [0, 1); DiT uses 0.9999.

    Attributes:
        tensors: The averages, float32, in the order of the parameters.

    Raises:
        UsageError: `decay` is out of range.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError.for_value("ema_decay", decay, "a number >= 0 and < 1")
        self.decay = decay
        self._parameters = list(parameters)
        self.tensors: list[Tensor] = [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of the step that was just made into the averages, in place."""
        torch._foreach_lerp_(self.tensors, [p.float() for p in self._parameters], 1 - self.decay)
