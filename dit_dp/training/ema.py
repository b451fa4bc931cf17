"""An exponential moving average of what trains, in float32."""

from collections.abc import Iterable, Sequence

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
        self._parameters: list[nn.Parameter] = []
        self.tensors: list[Tensor] = []
        parameters = list(parameters)
        self.follow(parameters, [None] * len(parameters))

    def follow(self, parameters: Sequence[nn.Parameter], averages: Sequence[Tensor | None]) -> None:
        """Average these parameters from now on, in place of those before.

        Args:
            parameters: What is averaged.
            averages: What they averaged to so far, taken as they are; `None`: an average starts at its parameter.
        """
        self._parameters = list(parameters)
        self.tensors = [
            parameter.detach().to(torch.float32, copy=True) if average is None else average
            for parameter, average in zip(self._parameters, averages, strict=True)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of the step that was just made into the averages, in place."""
        torch._foreach_lerp_(self.tensors, [p.float() for p in self._parameters], 1 - self.decay)
