"""The loop anybody would write: one example at a time, clipped and added up.

Needs no rule for any layer, holds one example's activations, and is the time a cleverer method has to beat. Cost over
ordinary training: the same operations in N small passes; memory: one more copy of the parameters, one example's
activations instead of N.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn, check_losses, clip_factors, map_tensors, num_rows
from dit_dp.clipping.engine import Engine, LayerRule
from dit_dp.clipping.rules import COUPLED
from dit_dp.errors import EngineStateError, UnsupportedModelError


class MicrobatchEngine(Engine):
    """Exact flat clipping by a loop over examples; must own the forward.

    **Guarantees**: adds at most C per example, up to rounding. **Edge cases**: an example whose norm is not finite
    is dropped; a parameter the output does not use has gradient zero.
    """

    method: ClassVar[str] = "microbatch"

    def _attach(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, COUPLED):
                raise UnsupportedModelError(
                    f"model: microbatch cannot run on layer {name}: it mixes the examples of a batch; "
                    f"use GroupNorm or LayerNorm"
                )

    def _detach(self) -> None:
        return None

    def accumulate(self, loss_fn: LossFn, batch: Batch) -> Tensor | None:
        """Clip and add one example after the other; phases alternate as examples do."""
        self._begin()
        examples = num_rows(batch)
        if examples == 0:
            self._announce("forward")
            return self._accumulate_nothing()
        norms = []
        with self._failing():
            for index in range(examples):
                self._announce("forward")
                losses = loss_fn(self.model, map_tensors(lambda t, i=index: t[i : i + 1], batch))  # type: ignore[misc]
                check_losses(losses, 1)
                norms.append(self._finish(losses))
        return torch.cat(norms)

    def backward(self, losses: Tensor) -> Tensor | None:
        """Refuse: a forward over the whole batch is what this method avoids."""
        raise EngineStateError("backward: microbatch runs the forward itself, one example at a time; call accumulate")

    def _finish(self, losses: Tensor) -> Tensor:
        self._announce("backward")
        parameters = list(self.parameters.values())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(losses[0], parameters, allow_unused=True)
        self._announce("clip")
        flat = [g.reshape(-1) for g in gradients if g is not None]
        squares = [g.dot(g).reshape(1) for g in flat]
        norm = torch.cat(squares).sum(0, keepdim=True).sqrt() if squares else losses.new_zeros(1)
        factor = clip_factors(norm, self.max_grad_norm)
        if bool(torch.isfinite(norm)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient.mul_(factor)
                else:
                    parameter.grad.addcmul_(gradient, factor)
        return norm.detach()

    @classmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Every layer that keeps examples apart."""
        if isinstance(module, COUPLED):
            return "none", "it mixes the examples of a batch; use GroupNorm or LayerNorm"
        return "direct", "autograd, one example at a time"
