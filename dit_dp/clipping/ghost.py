"""Two-pass ghost clipping: norms in a first backward, the clipped sum in a second.

Li, Tramer, Liang and Hashimoto, "Large language models can be strong differentially private learners"
(arXiv 2110.05679), section 4; mixed with direct norms where those are cheaper (Bu, Mao and Xu, arXiv
2205.10683). One forward; the first backward computes input gradients and per-example norms, never a parameter's
gradient; the second, over the same graph, sums ``min(1, C / |g_i|) g_i``.

Cost over ordinary training: one more set of input gradients (a third of its FLOPs), and the norms, the
smaller of 0.56 T^2 (d + p) and T d p multiply-adds a layer and example. Memory: what ordinary training holds, and
block rows of one layer's Gram matrices (at most 64 MiB or one example's).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.contributions import GHOST_SHARE, Contribution, Outer, joined_squared_norms
from dit_dp.clipping.engine import LayerRule
from dit_dp.clipping.watched import WatchedEngine

_REASONS = {
    "ghost": f"Gram matrices of T positions, as {GHOST_SHARE} T(d + p) < d·p",
    "direct": f"per-example gradient, then its norm, as {GHOST_SHARE} T(d + p) ≥ d·p",
    "outer product": "T = 1: |input| · |output gradient|",
}


class GhostEngine(WatchedEngine):
    """Exact flat clipping in two backward passes over one graph.

    **Guarantees**: adds at most C per unit to the sum, up to float32 rounding, under bf16 too: the second pass repeats
    the first, so that the norm and the sum see the same operands, and applies the factors in float32. **Edge cases**:
    a unit whose norm is not finite is dropped and its operands masked, so that weights stay finite.
    """

    method: ClassVar[str] = "ghost"
    walks_twice: ClassVar[bool] = True

    def _sum(self, losses: Tensor) -> None:
        torch.autograd.backward(losses, torch.full_like(losses, self._loss_weight))

    @classmethod
    def norm_rule(cls, positions: int, width: int, out_width: int) -> tuple[LayerRule, str]:
        """Return the rule that needs fewer operations."""
        rule = Outer.rule(positions, width, out_width)
        return rule, _REASONS[rule]

    def _settle(self, parameter: nn.Parameter, parts: list[Contribution]) -> None:
        assert self._squares is not None
        self._squares += self._squared_norms(parameter, parts)

    def _squared_norms(self, parameter: nn.Parameter, parts: list[Contribution]) -> Tensor:
        """Return the squared norms of a parameter's per-unit gradients, (U,), and note by which rule."""
        if all(isinstance(part, Outer) for part in parts):
            positions = sum(part.a.shape[1] for part in parts if isinstance(part, Outer))
            self._rules_used[self._names[parameter]] = Outer.rule(
                positions, parameter.shape[1:].numel(), parameter.shape[0]
            )
        return joined_squared_norms(parts, parameter.shape)
