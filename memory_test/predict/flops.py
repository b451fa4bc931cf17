"""Operations of one call, counted from its shapes: torch's formulas, and those of the kernels of ours."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from dit_dp.clipping.launch import kernel_tile

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""By product: which argument's last dimension is summed over. Their overloads do not all fit the counter's formulas."""


def count_flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Return an operation's FLOPs; 0 where nobody counts them."""
    if name in PRODUCTS:
        inner: int = args[PRODUCTS[name]].shape[-1]
        return 2 * int(out.numel()) * inner
    if name in KERNELS:
        return KERNELS[name](*args)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _norm_partials(a: Tensor, g: Tensor, gram: bool) -> int:
    """Two Gram matrices by tiles on and above the diagonal, or the gradient itself."""
    examples, positions, width = a.shape
    if gram:
        tile = kernel_tile(positions, a.dtype)
        return int(examples * positions * (positions + tile) * (width + g.shape[2]))
    return int(2 * examples * positions * width * g.shape[2])


def _weighted_sums(a: Tensor, g: Tensor, *others: Any) -> int:
    examples, positions, width = a.shape
    return int(2 * examples * positions * width * g.shape[2])


KERNELS: dict[str, Callable[..., int]] = {
    "dit_dp::norm_partials": _norm_partials,
    "dit_dp::weighted_sums": _weighted_sums,
}
"""By operation of ours (`dit_dp.clipping.launch`)."""
