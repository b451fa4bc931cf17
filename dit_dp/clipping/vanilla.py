"""Ordinary training as an engine: no clipping, no noise, the baseline of every ratio."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.engine import Engine, LayerRule, require_no_noise


class VanillaEngine(Engine):
    """Backward of the mean loss, as anybody would write it.

    The losses are divided by the size of the first batch since the last step before the backward, and
    `privatize` corrects by ``first / expected``, which is 1 in ordinary training: the baseline must not pay for
    a pass over the gradients that ordinary training does not make.
    """

    private: ClassVar[bool] = False

    def _attach(self) -> None:
        self._divisor: int | None = None

    def _detach(self) -> None:
        self._divisor = None

    def _finish(self, losses: Tensor) -> None:
        if self._divisor is None:
            self._divisor = losses.shape[0]
        self._announce("backward")
        (losses.sum() / self._divisor).backward()  # type: ignore[no-untyped-call]

    def _accumulate_nothing(self) -> None:
        super()._accumulate_nothing()

    def _privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: torch.Generator | None
    ) -> None:
        require_no_noise(noise_multiplier)
        self.ranks.require_same(None, expected_batch_size=expected_batch_size)
        scale = (self._divisor or 1) / expected_batch_size
        for name, parameter in self.parameters.items():
            own = self.model_parameters[name]
            if own is not parameter and own.grad is not None:
                parameter.grad, own.grad = own.grad.float(), None
            if scale != 1 and parameter.grad is not None:
                parameter.grad.mul_(scale)
        for _ in self.ranks.summed(self.parameters.values()):
            pass

    def zero_grad(self) -> None:
        """Clear gradients."""
        super().zero_grad()
        self._divisor = None

    @classmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Every layer trains."""
        return "direct", "autograd"
