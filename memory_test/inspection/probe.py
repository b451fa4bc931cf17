"""One forward pass that is watched: which module is called with what, and which parameters the output uses."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.errors import UsageError
from memory_test.core.custom import users_code
from memory_test.inspection.facts import Call, Shape
from memory_test.inspection.subject import Subject


@dataclass(frozen=True)
class Probe:
    """What one forward pass showed.

    Attributes:
        failure: Why there was none, or `None`.
        num_examples: N, the first dimension that all inputs share, or `None`.
        calls: By module name; a module that was not called is missing.
        used: Names of the parameters that the output depends on.
    """

    failure: str | None = None
    num_examples: int | None = None
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    used: frozenset[str] = frozenset()


def run_probe(subject: Subject) -> Probe:
    """Call the model once on its inputs, with gradients enabled and no backward."""
    if subject.inputs is None:
        return Probe(failure="the callable returned no inputs")
    calls: dict[str, list[Call]] = {}
    handles = [
        module.register_forward_hook(_record(calls.setdefault(name, [])), with_kwargs=True)
        for name, module in subject.model.named_modules()
    ]
    tensors = _meta_tensors(subject.model) if subject.on_meta else _own_tensors(subject.model)
    try:
        with (
            users_code("the forward pass"),
            torch.enable_grad(),
            contextlib.redirect_stdout(sys.stderr),
        ):
            output = _call(subject, tensors)
    except UsageError as error:
        return Probe(failure=str(error))
    finally:
        for handle in handles:
            handle.remove()
    return Probe(
        num_examples=_num_examples(subject.inputs),
        calls={name: tuple(seen) for name, seen in calls.items() if seen},
        used=_used(output, tensors),
    )


def _call(subject: Subject, tensors: dict[str, Tensor]) -> Any:
    """Run the forward pass; on the meta device with stand-ins for the parameters, tied ones tied."""
    assert subject.inputs is not None
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    named = subject.inputs if isinstance(subject.inputs, Mapping) else {}
    positional = () if isinstance(subject.inputs, Mapping) else subject.inputs
    args = tuple(_to(value, device) for value in positional)
    kwargs = {name: _to(value, device) for name, value in named.items()}
    if subject.on_meta:
        return torch.func.functional_call(subject.model, tensors, args, kwargs)
    return subject.model(*args, **kwargs)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _meta_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors of the same shapes without memory."""
    return {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in _own_tensors(model).items()
    }


def _record(calls: list[Call]) -> Callable[..., None]:
    """Return a hook that notes the shapes of a call."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        positional = tuple(_shapes(args))
        inputs = positional + tuple(_shapes(kwargs))
        calls.append(Call(inputs=inputs, outputs=tuple(_shapes(output)), positional=len(positional)))

    return hook


def _shapes(value: Any) -> Iterator[Shape]:
    for tensor in _tensors(value):
        yield tuple(tensor.shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _num_examples(inputs: Any) -> int | None:
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in _tensors(inputs)}
    return sizes.pop() if len(sizes) == 1 else None


def _used(output: Any, tensors: dict[str, Tensor]) -> frozenset[str]:
    """Walk the graph from the output to the parameters it was made from."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            used.add(names[id(variable)])
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        nodes.extend(following)
    return frozenset(used)
