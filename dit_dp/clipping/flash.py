"""`flash_clip` and `flash_clip_bk`: ghost clipping and book-keeping whose norms hold no matrix an example.

They differ from `ghost` and `bookkeeping` in the norm of a weight alone, which `tiled` takes tile by tile: Triton on
CUDA, the same maths in torch elsewhere.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_dp.clipping import tiled
from dit_dp.clipping.bookkeeping import BookkeepingEngine
from dit_dp.clipping.contributions import Contribution, Outer, joined
from dit_dp.clipping.engine import LayerRule
from dit_dp.clipping.ghost import GhostEngine
from dit_dp.clipping.launch import runs_kernels
from dit_dp.clipping.watched import WatchedEngine

_REASONS = {
    "ghost": "tiles of the Gram matrices of T positions, as T(d + p) < 2 d·p",
    "direct": "tiles of the per-example gradient, as T(d + p) ≥ 2 d·p",
    "outer product": "T = 1: |input| · |output gradient|",
}


class _TileByTile(WatchedEngine):
    """What the two engines share: the norm of a weight seen as a matrix."""

    def _attach(self) -> None:
        self._norm_kernels: set[str] = set()
        super()._attach()

    def _tiled_norms(self, parameter: nn.Parameter, whole: Outer) -> Tensor:
        """Return the squared norms of a weight seen as a matrix, (U,), and note how they were taken."""
        rule = tiled.norm_rule_of(whole.a, whole.g)
        self._rules_used[self._names[parameter]] = rule
        if rule != "outer product":
            self._norm_kernels.add("triton" if runs_kernels(whole.a) else "torch")
        return tiled.squared_norms(whole.a, whole.g)

    @classmethod
    def norm_rule(cls, positions: int, width: int, out_width: int) -> tuple[LayerRule, str]:
        """Return the rule that needs fewer operations."""
        rule = tiled.norm_rule(positions, width, out_width)
        return rule, _REASONS[rule]

    def choices(self) -> dict[str, Any]:
        """Return how many weights used which norm rule, and what computed the tiles."""
        return {**super().choices(), "norm_kernels": sorted(self._norm_kernels)}


class FlashClipEngine(_TileByTile, GhostEngine):
    """Two backward passes over one graph, as `ghost`; norms tile by tile.

    With tiles of t, the norm of a layer and example takes the fewer of T (T + t) (d + p) and 2 T d p FLOPs. Numbers
    that Triton's programs read: T (T / t + 1) (d + p), or 2 T d p / t, nearly all of them from the second-level cache;
    from memory T (d + p). Held meanwhile: 4 bytes a program, of which there are N T (T + t) / 2t^2, or N d p / t^2
    (t is 128 for half precision, 64 for float32); on a CPU 512 KiB, and half-precision operands of a few examples at
    a time in float32.

    **Guarantees** and **edge cases**: as in `ghost`.
    """

    method: ClassVar[str] = "flash_clip"

    def _squared_norms(self, parameter: nn.Parameter, parts: list[Contribution]) -> Tensor:
        whole = _as_matrix(parts)
        return super()._squared_norms(parameter, parts) if whole is None else self._tiled_norms(parameter, whole)


class FlashClipBookkeepingEngine(_TileByTile, BookkeepingEngine):
    """One backward pass that books the operands of every weight, as `bookkeeping` that keeps nothing; norms by tiles.

    FLOPs and bytes of the norms: as in `flash_clip`; ordinary training computes all the rest too. Booked when the
    backward ends: N T (d + p) numbers a layer, about as much as the activations that the backward has freed.

    **Guarantees** and **edge cases**: as in `bookkeeping`.
    """

    method: ClassVar[str] = "flash_clip_bk"

    def __init__(
        self, model: nn.Module, *, max_grad_norm: float, on_phase: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(model, max_grad_norm=max_grad_norm, on_phase=on_phase, keep_up_to=0)

    def _settle(self, parameter: nn.Parameter, parts: list[Contribution]) -> None:
        whole = _as_matrix(parts)
        if whole is None:
            super()._settle(parameter, parts)
            return
        assert self._squares is not None
        self._squares += self._tiled_norms(parameter, whole)
        self._book.append((parameter, whole))


def _as_matrix(parts: list[Contribution]) -> Outer | None:
    """Return the joined calls of a weight that is a matrix, or `None`: for rows, biases, scales and mixtures."""
    outers = [part for part in parts if isinstance(part, Outer)]
    return joined(outers) if len(outers) == len(parts) else None
