"""Which part of a model runs: its groups of parameters, told to a meter as modules begin and end.

A module belongs to a part if all parameters in it do. Hooks are torch's global ones, so that the model stays as it is;
the gradient of what a part returns says that its backward begins.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves


def parts_by_name(model: nn.Module) -> dict[str, str]:
    """Return the part of each parameter by its name; none for a model that does not say."""
    groups = getattr(model, "parameter_groups", None)
    return {name: part for part, names in groups().items() for name in names} if callable(groups) else {}


@contextlib.contextmanager
def parts_told(model: nn.Module, tell: Callable[[str | None], None]) -> Iterator[None]:
    """Tell of each change of the part that runs, as long as the context is open.

    Args:
        model: Has `parameter_groups`; of any other nothing is told.
        tell: Told of the part that runs from now on; `None`: none.
    """
    owners = _owners(model)
    if not owners:
        yield
        return
    watch = _Watch(model, owners, tell)
    handles = [
        hooks.register_module_forward_pre_hook(watch.enter),
        hooks.register_module_forward_hook(watch.leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(model: nn.Module) -> dict[int, str]:
    """Return the part of each module by its identity; a module with parameters of several parts is left out."""
    known, owners = parts_by_name(model), {}
    for prefix, module in model.named_modules():
        names = (f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters())
        found = {known[name] for name in names if name in known}
        if len(found) == 1:
            owners[id(module)] = found.pop()
    return owners


class _Watch:
    """Follows calls into modules and out of them, and the backward into parts."""

    def __init__(self, model: nn.Module, owners: dict[int, str], tell: Callable[[str | None], None]) -> None:
        self._model, self._owners, self._tell = model, owners, tell
        self._part: str | None = None
        self._outside: list[str | None] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Note that a module is called."""
        if module is self._model:  # a call that raised, or was not gone through to its end, leaves nothing behind
            self._outside, self._part = [], None
        self._outside.append(self._part)
        self._change(self._owners.get(id(module), self._part))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that a module has returned."""
        part, outside = self._part, self._outside.pop() if self._outside else None
        if part is not None and part != outside:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._backward, part))  # type: ignore[no-untyped-call]
        self._change(outside)

    def _backward(self, part: str, gradient: Tensor) -> None:
        self._tell(part)

    def _change(self, part: str | None) -> None:
        if part != self._part:
            self._part = part
            self._tell(part)
