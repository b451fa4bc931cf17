"""The loop anybody would write: one example at a time, clipped and added up.

Needs no rule for any layer, holds one example's activations, and is the time a cleverer method has to beat. Cost over
ordinary training: the same operations in N small passes; memory: one more copy of the parameters, one example's
activations instead of N.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn, check_losses, clip_factors, gradients_of
from dit_dp.clipping.contributions import float32
from dit_dp.clipping.engine import Engine, LayerRule
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.rules import COUPLED
from dit_dp.clipping.units import Units
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

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor:
        """Clip and add one unit after the other; phases alternate as units do."""
        norms = []
        for index in hardware().rounds(units.num_units):
            if index:
                self._announce("forward")
            one, _ = units.take(batch, index, index + 1)
            losses = loss_fn(self.model, one)
            check_losses(losses, 1)
            norms.append(self._finish(losses))
        return torch.cat(norms)

    def backward(self, losses: Tensor) -> Tensor | None:
        """Refuse: a forward over the whole batch is what this method avoids."""
        raise EngineStateError("backward: microbatch runs the forward itself, one example at a time; call accumulate")

    def _finish(self, losses: Tensor) -> Tensor:
        self._announce("backward")
        gradients = gradients_of(losses[0], self.model_parameters.values())
        self._announce("clip")
        found = [None if g is None else float32(g) for g in gradients]
        flat = [g.reshape(-1) for g in found if g is not None]
        squares = [g.dot(g).reshape(1) for g in flat]
        norm = torch.cat(squares).sum(0, keepdim=True).sqrt() if squares else losses.new_zeros(1)
        factor = clip_factors(norm, self.max_grad_norm)[0]  # scalar parameters take no other
        if not hardware().holds(torch.isfinite(norm), usually=True):
            self.num_dropped += 1
        else:
            for parameter, gradient in zip(self.parameters.values(), found, strict=True):
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
