"""Two-pass ghost clipping: norms in a first backward, the clipped sum in a second.

Li, Tramer, Liang and Hashimoto, "Large language models can be strong differentially private learners"
(arXiv 2110.05679), section 4; mixed with direct norms where those are cheaper (Bu, Mao and Xu, arXiv
2205.10683). One forward; the first backward computes input gradients and per-example norms, never a parameter's
gradient; the second back-propagates ``min(1, C / |g_i|) loss_i`` as ordinary training would.

Cost over ordinary training: one more set of input gradients (a third of its FLOPs), and the norms, the
smaller of T^2 (d + p) and T d p multiply-adds a layer and example. Memory: what ordinary training holds, and
one layer's Gram matrices (N 2 T^2, at most 64 MiB or one example's).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import clip_factors
from dit_dp.clipping.contributions import Contribution, Outer, joined_squared_norms
from dit_dp.clipping.engine import LayerRule
from dit_dp.clipping.watched import WatchedEngine, WatchedLayer

_REASONS = {
    "ghost": "Gram matrices of T positions, as T(d + p) < d·p",
    "direct": "per-example gradient, then its norm, as T(d + p) ≥ d·p",
    "outer product": "T = 1: |input| · |output gradient|",
}


class GhostEngine(WatchedEngine):
    """Exact flat clipping in two backward passes over one graph.

    **Guarantees**: adds at most C per example to the sum, up to the rounding of that example's own operands: below
    1e-4 C in float32; under bf16 autocast a few 1e-3 C, because the second pass rounds again. Sums over examples
    are taken in float32. **Edge cases**: an example whose norm is not finite is dropped and its operands masked, so
    that weights stay finite.
    """

    method: ClassVar[str] = "ghost"

    def _attach(self) -> None:
        self._measuring = False
        self._keep: Tensor | None = None
        super()._attach()

    def _finish(self, losses: Tensor) -> Tensor:
        self._announce("backward")
        self._in_backward = True
        try:
            self._measuring = True
            self._backward_for_norms(losses, retain_graph=True)
            self._measuring = False
            assert self._squares is not None
            self._announce("clip")
            norms = self._squares.sqrt()
            factors = clip_factors(norms, self.max_grad_norm)
            finite = torch.isfinite(norms)
            self._keep = None if bool(finite.all()) else finite
            torch.autograd.backward(losses, factors.to(losses.dtype))
        finally:
            self._measuring, self._keep = False, None
            self._forget()
        return norms

    def parameter_gradients(
        self, layer: WatchedLayer, x: Tensor, weight: Tensor | None, g: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return nothing in the first pass, which observes, and the weighted losses' gradients in the second."""
        if self._measuring:
            self.observe(layer, x, g)
            return None, None
        x, g = self._without_dropped(x, g)
        return layer.rule.parameter_gradients(layer.module, x, weight, g, needed)

    def _without_dropped(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return a call's operands with the rows of dropped examples set to zero."""
        if self._keep is None:
            return x, g
        keep = self._keep.view(-1, *[1] * (g.dim() - 1))
        x = x if not x.is_floating_point() else torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, 0)
        return x, torch.where(keep, g, 0)

    @classmethod
    def norm_rule(cls, positions: int, width: int, out_width: int) -> tuple[LayerRule, str]:
        """Return the rule that needs fewer operations."""
        rule = Outer.rule(positions, width, out_width)
        return rule, _REASONS[rule]

    def _settle(self, parameter: nn.Parameter, parts: list[Contribution]) -> None:
        assert self._squares is not None
        if all(isinstance(part, Outer) for part in parts):
            positions = sum(part.a.shape[1] for part in parts if isinstance(part, Outer))
            self._rules_used[self._names[parameter]] = Outer.rule(positions, parameter[0].numel(), parameter.shape[0])
        self._squares += joined_squared_norms(parts, parameter.shape)
