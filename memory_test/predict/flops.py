"""What one call takes, counted from its shapes: torch's formulas, and those of the kernels of ours."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dit_dp.clipping.launch import kernel_tile

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""By product: which argument's last dimension is summed over. Their overloads do not all fit the counter's formulas."""

NO_KERNEL = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "squeeze_", "unsqueeze_")
)
"""Operations that only say where numbers are or will be."""


def stem(name: str) -> str:
    """Return the name of an operation, or of the one that it does in place."""
    return name.removesuffix("_")


def count_flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Return an operation's FLOPs; 0 where nobody counts them."""
    if stem(name) in PRODUCTS:
        inner: int = args[PRODUCTS[stem(name)]].shape[-1]
        return 2 * int(out.numel()) * inner
    if name in KERNELS:
        return KERNELS[name](*args)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def count_bytes(func: Any, name: str, args: Any, kwargs: Any, tensors: Iterable[Tensor], results: list[Tensor]) -> int:
    """Return the bytes an operation reads and writes: operands and results once each.

    What returns nothing writes to arguments, such as an optimizer's lists of parameters and moments.
    """
    if name in NO_KERNEL:
        return 0
    written = results or [
        tensor
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))
        if isinstance(tensor, Tensor)
    ]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*tensors, *written))


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


def _kept_gradients(a: Tensor, g: Tensor) -> int:
    return _norm_partials(a, g, False)


KERNELS: dict[str, Callable[..., int]] = {
    "dit_dp::norm_partials": _norm_partials,
    "dit_dp::kept_gradients": _kept_gradients,
    "dit_dp::weighted_sums": _weighted_sums,
}
"""By operation of ours (`dit_dp.clipping.launch`)."""
