"""How an operation in which raw parameters meet the examples is run, so that each example has a gradient of its own.

Shapes: N examples, T positions, d inputs, p outputs. A handler gets a follower of raw parameters (`RawParameters`), the
operation and its arguments, of which at least one is derived from raw parameters and one is the examples'. It reads
the derived ones once for each example and runs the operation, or an equal one, on the copies.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_dp.clipping.rules import EmbeddingRule, LinearRule, MatmulRule

if TYPE_CHECKING:
    from dit_dp.clipping.raw import RawParameters

Operation = Callable[..., Any]
Handler = Callable[["RawParameters", Operation, tuple[Any, ...], dict[str, Any]], Any]

LINEAR, MATMUL, EMBEDDING = LinearRule(), MatmulRule(), EmbeddingRule()

POINTWISE = (
    *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "rdiv", "rtruediv"),
    *("floor_divide", "remainder", "fmod", "pow", "rpow", "where", "lerp", "addcmul", "addcdiv", "maximum", "minimum"),
    *("fmax", "fmin", "clamp", "clip", "clamp_min", "clamp_max", "atan2", "hypot", "logaddexp", "xlogy", "copysign"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
)
"""Operations that broadcast their operands; in-place and reflected forms go by the same names."""

SHAPE_ONLY = ("expand_as", "view_as", "reshape_as", "type_as", "to")
"""Methods that take nothing of their other tensor but its shape or dtype."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def mutates(func: Operation) -> bool:
    """Return whether an operation writes into its first argument."""
    name: str = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def combine(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on derived tensors and the examples.

    Raises:
        UnsupportedModelError: No per-example gradient is known for it; names the parameter, the operation and the fix.
    """
    name = getattr(func, "__name__", "").strip("_")
    tensors = list(tensors_in((args, kwargs)))
    if name not in HANDLERS:
        raise raw.refuse(func, tensors, "has no rule for it")
    if mutates(func) and raw.is_derived(args[0]):
        raise raw.refuse(func, tensors, "writes examples into it")
    return HANDLERS[name](raw, func, args, kwargs)


def map_nested(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return nested arguments with a function applied to their tensors; what holds none that changes stays itself."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, (tuple, list, dict)):
        return value
    members = list(value.values()) if isinstance(value, dict) else list(value)
    changed = [map_nested(member, function) for member in members]
    if all(new is old for new, old in zip(changed, members, strict=True)):
        return value
    if isinstance(value, dict):
        other = copy.copy(value)
        other.update(zip(value, changed, strict=True))
        return other
    if isinstance(value, list):
        return changed
    return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)


def _with_copies(
    raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, rank: int
) -> Any:
    """Run an operation on copies of its derived arguments."""

    def copied(tensor: Tensor) -> Tensor:
        return raw.read(tensor, rows, rank) if raw.is_derived(tensor) else tensor

    return func(*map_nested(args, copied), **map_nested(kwargs, copied))


def _pointwise(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Broadcast over the examples: they must be the first dimension of the result, and of an operand of its rank."""
    tensors = list(tensors_in((args, kwargs)))
    rank = max(tensor.dim() for tensor in tensors)
    rows = max((tensor.shape[0] for tensor in tensors if tensor.dim() == rank > 0), default=0)
    examples = filter(raw.is_example, tensors)
    if not any(tensor.dim() == rank > 0 and tensor.shape[0] == rows for tensor in examples):
        raise raw.refuse(func, tensors, "puts another dimension before the examples'")
    return _with_copies(raw, func, args, kwargs, rows, rank)


def _attention(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Learned queries, keys or values of all examples, and learned biases: batch dimensions broadcast."""
    tensors = list(tensors_in((args, kwargs)))
    examples = max(filter(raw.is_example, tensors), key=Tensor.dim)
    return _with_copies(raw, func, args, kwargs, examples.shape[0], examples.dim())


def _joining(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join along any dimension but the examples'; derived parts were expanded over the examples by the model."""
    tensors = list(tensors_in((args, kwargs)))
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    examples = next(filter(raw.is_example, tensors))
    rank = examples.dim()
    if dim % (rank + (getattr(func, "__name__", "") == "stack")) == 0:
        raise raw.refuse(func, tensors, "joins it to the batch as if it were an example")
    return _with_copies(raw, func, args, kwargs, examples.shape[0], rank)


def _assigned(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[:, ...] = value``."""
    target, index, value = args
    place = index if isinstance(index, tuple) else (index,)
    if not (place and place[0] in (slice(None), ...)) or any(isinstance(part, Tensor) for part in place):
        raise raw.refuse(func, [value], "assigns it to some examples only")
    rank = max(target[index].dim(), value.dim())
    return func(target, index, raw.read(value, target.shape[0], rank))


def _looked_up(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``table[index]``: an embedding."""
    table, index = args
    weight = raw.raw(table)
    if weight is None or weight.dim() != 2 or not isinstance(index, Tensor) or index.dtype == torch.bool:
        raise raw.refuse(func, [table], "looks it up by something other than one tensor of indices into a matrix")
    return _embedding(raw, func, (index, weight), {})


def _embedding(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.embedding`` of a raw table."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight = raw.raw(given["weight"])
    if weight is None:
        raise raw.refuse(func, [given["weight"]], "looks it up after it was changed")
    options = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False, "padding_idx": None}
    options.update({name: given[name] for name in options if name in given})
    return raw.as_layer(EMBEDDING, given["input"], weight, None, **options)


def _linear(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.linear``: a layer where the weight is a raw matrix; else a product with a copy of it for each example."""
    x, weight, bias = _bound(("input", "weight", "bias"), args, kwargs)
    if raw.is_derived(x):
        raise raw.refuse(func, [x], "has another tensor's weight")
    if raw.raw(weight) is not None and (bias is None or raw.raw(bias) is not None):
        return raw.as_layer(LINEAR, x, weight, bias)
    out = raw.run(torch.matmul, x, raw.run(torch.t, weight)) if raw.is_derived(weight) else F.linear(x, weight)
    return out if bias is None else raw.run(torch.add, out, raw.run(Tensor.to, bias, out.dtype))


def _product(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x @ w``: a layer where w is a raw matrix or its transpose, else a product with a copy for each example."""
    a, b = args if len(args) == 2 else _bound(("input", "other"), args, kwargs)
    if getattr(func, "__name__", "") == "__rmatmul__":
        a, b = b, a
    if raw.is_derived(b) and b.dim() == 1:
        return raw.run(torch.mul, a, b).sum(-1)
    if raw.is_derived(b) and b.dim() == 2 and a.dim() > 1 and not raw.is_derived(a):
        if raw.raw(b) is not None:
            return raw.as_layer(MATMUL, a, b, None)
        weight = raw.transposed(b)
        if weight is not None:
            return raw.as_layer(LINEAR, a, weight, None)
        if a.dim() == 2:  # (N, d) @ (N, d, p) would mix examples
            return (a[:, None] @ raw.read(b, a.shape[0], 3))[:, 0]
    examples = b if raw.is_derived(a) else a
    if examples.dim() < 3 or max(a.dim(), b.dim()) > examples.dim() or min(a.dim(), b.dim()) < 2:
        raise raw.refuse(func, [a, b], "contracts it with the examples' dimension")
    return _with_copies(raw, torch.matmul, (a, b), {}, examples.shape[0], examples.dim())


def _normalised(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.layer_norm``, ``F.rms_norm`` or ``F.group_norm``: normalise, then scale and shift by broadcasting."""
    name = getattr(func, "__name__", "")
    affine = ("weight",) if name == "rms_norm" else ("weight", "bias")
    given = {**dict(zip(("input", "normalized_shape", *affine, "eps"), args, strict=False)), **kwargs}
    x, over = given.pop("input"), given.pop("normalized_shape", None) or given.pop("num_groups")
    if raw.is_derived(x):
        raise raw.refuse(func, [x], "normalises it")
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    out = getattr(F, name)(x, over, **{key: value for key, value in given.items() if key == "eps"})
    for operation, parameter in ((torch.mul, weight), (torch.add, bias)):
        if parameter is None:
            continue
        if name == "group_norm":
            parameter = raw.run(torch.reshape, parameter, (-1, *[1] * (x.dim() - 2)))
        out = raw.run(operation, out, parameter)
    return out


def _shape_only(raw: "RawParameters", func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take a shape or dtype from the other tensor, and nothing else."""
    first, other = args[:2]
    if not raw.is_derived(first):
        return func(*args, **kwargs)
    if getattr(func, "__name__", "") in ("to", "type_as"):
        return raw.run(Tensor.to, first, device=other.device, dtype=other.dtype)
    change = Tensor.expand if getattr(func, "__name__", "") == "expand_as" else Tensor.reshape
    return raw.run(change, first, other.shape)


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return arguments in the order of their names, `None` where one is missing."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given.get(name) for name in names)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(SHAPE_ONLY, _shape_only),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joining),
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm"), _product),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _normalised),
    "scaled_dot_product_attention": _attention,
    "setitem": _assigned,
    "getitem": _looked_up,
    "embedding": _embedding,
    "linear": _linear,
}
"""By the operation's name without underscores."""
