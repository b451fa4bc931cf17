"""What operations return, remembered: for arguments of shapes that were seen, results are made and not derived again.

`FakeTensorMode` remembers too, by keys that take longer to make than what they stand for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Result:
    """How to make one tensor.

    Attributes:
        argument: Number, among the tensors of the arguments, of the one it is or whose storage it has; `None`: its
            storage is new.
        same: Whether it is that argument.
        shape, stride, offset, dtype: What it is like.
    """

    argument: int | None
    same: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Results:
    """What an operation returns: a container, or `None` for one result alone, and what is in it, tensors or else."""

    container: type[Any] | None
    members: tuple[Any, ...]
    mode: FakeTensorMode | None


class KnownResults:
    """Runs operations on fake tensors of the CPU."""

    def __init__(self) -> None:
        self._known: dict[Key, _Results | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Key | None, of: list[Tensor]) -> Any:
        """Return what an operation returns.

        Args:
            func: The operation.
            args: Its arguments.
            kwargs: Its arguments by name.
            key: Of the call, from `call_key`.
            of: The tensors among the arguments.
        """
        known = None if key is None else self._known.get(key)
        if known is not None:
            made = [_make(each, known.mode, of) if isinstance(each, _Result) else each for each in known.members]
            return made[0] if known.container is None else known.container(made)
        out = func(*args, **kwargs)
        if key is not None and key not in self._known:
            self._known[key] = _results(out, of) if _follows_from_shapes(func) else None
        return out


def call_key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Key | None:
    """Return what an operation's results are like follows from; `None` if more than shapes matters.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Its arguments by name.
        tensors: Those among the arguments are appended.
    """
    parts = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    able = _describe(args, parts, tensors)
    if kwargs:
        parts += kwargs
        able &= _describe(kwargs.values(), parts, tensors)
    return tuple(parts) if able else None


def _describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Append what arguments are, and their tensors; return whether that says all."""
    able = True
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            if type(value) is not FakeTensor or value.constant is not None or value.layout is not torch.strided:
                able = False
            else:
                size = value.untyped_storage().nbytes()
                parts += (value.dtype, value.shape, value.stride(), value.storage_offset(), size, value.requires_grad)
        elif isinstance(value, (list, tuple)):
            parts += (type(value), len(value))
            able &= _describe(value, parts, tensors)
        else:
            parts += (type(value), value)  # 1 and 1.0 are equal
    return able


def _follows_from_shapes(func: Any) -> bool:
    """Return whether an operation is torch's or ours, and neither asks for data nor gives an argument another shape."""
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
    name: str = func._schema.name
    able = name.startswith(("aten::", "dit_dp::")) and name not in _OTHER_STORAGE
    return able and not any(tag in func.tags for tag in tags)


_OTHER_STORAGE = ("aten::set_", "aten::resize_", "aten::resize_as_", "aten::set_data")
"""Give an argument's tensor another shape or storage."""


def _results(out: Any, of: list[Tensor]) -> _Results | None:
    """Return how to make results again; `None` if it cannot be told."""
    if not (out is None or isinstance(out, Tensor) or type(out) in (list, tuple)):
        return None
    leaves = tree_leaves(out) if isinstance(out, (list, tuple)) else [out]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(type(leaf) is not FakeTensor for leaf in tensors):
        return None
    mode = getattr(tensors[0] if tensors else None, "fake_mode", None)
    members = tuple(_result(leaf, of) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    fresh = set[int]()
    for member, leaf in zip(members, leaves, strict=True):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()._cdata
            if storage in fresh or not _alike(_make(member, mode, of), leaf):
                return None
            fresh |= {storage} if member.argument is None else set()
    return _Results(type(out) if isinstance(out, (list, tuple)) else None, members, mode)


def _result(tensor: Tensor, of: list[Tensor]) -> _Result:
    storage = tensor.untyped_storage()._cdata
    found = [number for number, each in enumerate(of) if each is tensor]
    shared = found or [number for number, each in enumerate(of) if each.untyped_storage()._cdata == storage]
    return _Result(
        argument=shared[0] if shared else None,
        same=bool(found),
        shape=tensor.shape,
        stride=tensor.stride(),
        offset=int(tensor.storage_offset()),
        dtype=tensor.dtype,
    )


def _make(result: _Result, mode: FakeTensorMode | None, of: list[Tensor]) -> Tensor:
    """Return a tensor made so, beside the arguments' tensors."""
    if result.same:
        assert result.argument is not None
        return of[result.argument]
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        made = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
        if result.argument is not None:
            made.set_(of[result.argument].untyped_storage(), result.offset, result.shape, result.stride)
        return _fake(mode, made)


def _fake(mode: FakeTensorMode | None, blank: Tensor) -> Tensor:
    """Return a fake tensor of the CPU, as its constructor does, which looks at many arguments that are not given."""
    if _LIKE.get("fake_mode") is not mode:
        _LIKE.clear()
        _LIKE.update(vars(FakeTensor(mode, blank, _CPU)))
    made: Tensor = torch.Tensor._make_subclass(
        FakeTensor, blank, False, dispatch_device=True, device_for_backend_keys=_CPU
    )
    vars(made).update(_LIKE)
    return made


_CPU = torch.device("cpu")
_LIKE: dict[str, Any] = {}
"""What a fake tensor of the present mode holds beyond its shape."""


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same to operations, and hold as much."""
    return (
        torch._C._dispatch_key_set(one) == torch._C._dispatch_key_set(other)
        and getattr(other, "constant", None) is None
        and one.device == other.device
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
    )
