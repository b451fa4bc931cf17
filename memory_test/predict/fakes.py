"""What torch and Opacus cannot do with fake tensors, done another way while a device is imagined."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight
from torch.utils._python_dispatch import _disable_current_modes


def _distinct_rows(tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Stand in for `unique_dim`: all rows are distinct, which takes most."""
    index = tensor.new_empty(tensor.shape[0], dtype=torch.int64)
    return tensor.clone(), index, index.clone()


def _some_scalar(tensor: Tensor) -> int | float | bool:
    """Stand in for `item`: one."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


STAND_INS: dict[str, Callable[..., Any]] = {
    "unique_dim": _distinct_rows,
    "_local_scalar_dense": _some_scalar,
}
"""By operation whose result depends on data: what to take for it. Opacus and optimizers ask; our engines are told."""


@contextlib.contextmanager
def workable() -> Iterator[None]:
    """Have modules of fake tensors converted and copied, their parameters expanded, and files of weights read.

    torch would swap a module's fake parameters, deep-copy a fake tensor with its mode (2.13: memory is corrupted), and
    refuse to make a subclass of one; safetensors views storages, which have data.
    """
    apply, deepcopy, new = nn.Module._apply, FakeTensor.__deepcopy__, ExpandedWeight.__new__
    load_file = safetensors.torch.load_file

    def convert(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
            return apply(module, fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        for child in module.children() if recurse else ():
            convert(child, fn)
        for name, parameter in module._parameters.items():
            if parameter is not None and (other := fn(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(other, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
        return module

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            made = tensor.detach().clone()
            made = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
            memo[id(tensor)] = made.requires_grad_(tensor.requires_grad)
        result: Tensor = memo[id(tensor)]
        return result

    def expanded(cls: type, weight: Tensor, batch_size: int, loss_reduction: str) -> Any:
        if not isinstance(weight, FakeTensor):
            return new(cls, weight, batch_size, loss_reduction)  # type: ignore[no-untyped-call]
        with _disable_current_modes():  # computes with `orig_weight`; what it is a subclass of is never read
            blank = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            return torch.Tensor._make_subclass(cls, blank, True)

    def read(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            found = load_file(*args, **kwargs)
        return {name: torch.empty_like(tensor) for name, tensor in found.items()}

    safetensors.torch.load_file = read
    nn.Module._apply, FakeTensor.__deepcopy__ = convert, copied  # type: ignore[method-assign]
    ExpandedWeight.__new__ = expanded  # type: ignore[method-assign]
    try:
        yield
    finally:
        safetensors.torch.load_file = load_file
        nn.Module._apply, FakeTensor.__deepcopy__ = apply, deepcopy  # type: ignore[method-assign]
        ExpandedWeight.__new__ = new  # type: ignore[method-assign]
