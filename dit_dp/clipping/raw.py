"""Raw parameters: those that no layer's rule covers, read by the model's own code.

Positions, class tokens, scales, registers, LayerScale and low-rank adapters are `nn.Parameter`s that a forward pass
combines with the examples by broadcasting, `cat`, `where` or a matrix product. While the forward runs, a
`TorchFunctionMode` follows what is made of them. A tensor made of raw parameters and constants alone stays *derived*,
whatever the operation: autograd differentiates it. Where a derived tensor meets the examples, `reading.read` gives
every example a copy of its own, so that the backward pass finds one gradient for each.

The examples' are the tensors a forward was given and what is made of them, or of layers. Every other tensor counts as a
constant, which is exact even for one that does hold examples: what is made of it and of raw parameters is read row by
row. A read that the mode cannot see leaves a gradient behind, by which the engine finds and refuses it.
"""

import contextlib
import math
import types
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from dit_dp.clipping.compiled import outside_graphs, uncompiled
from dit_dp.clipping.contributions import Contribution
from dit_dp.clipping.gathered import sharded_modules
from dit_dp.clipping.raw_operations import combine, map_nested, mutates, tensors_in
from dit_dp.clipping.reading import read
from dit_dp.clipping.rules import Rule
from dit_dp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from dit_dp.clipping.watched import WatchedEngine


class RawParameters(TorchFunctionMode):
    """Follows the raw parameters of a model through its forward pass, on behalf of an engine.

    Under FSDP2 a parameter is two: the shard that was attached, and the full one that is in its place while a group of
    modules runs. What is read, and differentiated by, is the full one; the engine is told of the shard.

    Args:
        engine: Gets the per-example gradients.
        parameters: The raw parameters, by name; without any, nothing is watched and nothing costs.
    """

    def __init__(self, engine: "WatchedEngine", parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.engine = engine
        self._attached = parameters
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._gathered: dict[str, nn.Parameter] = {}
        self._places: list[tuple[dict[str, nn.Parameter | None], str, str]] = []
        self._derived = WeakTensorKeyDictionary()  # tensor -> the raw parameters it is made of
        self._examples = WeakTensorKeyDictionary()  # those without a gradient; others show by having one
        self._layers: dict[tuple[Any, ...], Any] = {}
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._passed: dict[nn.Module, list[Tensor | None]] = {}
        self._watching = False

    def attach(self, model: nn.Module, layers: Container[nn.Module]) -> None:
        """Watch the forward of every module but the layers, which read no raw parameter.

        Every one, since checkpointing re-enters through any of them when it recomputes in the backward pass.
        """
        if not self._names:
            return
        for prefix, module in model.named_modules():
            for own in module._parameters:
                name = f"{prefix}.{own}" if prefix else own
                if name in self._attached:
                    self._places.append((module._parameters, own, name))
            if module not in layers:
                self._forwards.append((module, module.__dict__.get("forward")))
                module.forward = types.MethodType(outside_graphs(self._watched(module.forward)), module)
        for module in sharded_modules(model):
            if module not in layers:  # one that is a layer is refused what FSDP2 hands it
                self._hooks.append(module.register_forward_pre_hook(self._set_aside, with_kwargs=True, prepend=True))

    def detach(self) -> None:
        """Put the forwards back."""
        for module, earlier in reversed(self._forwards):
            del module.forward
            if earlier is not None:
                module.forward = earlier
        self._forwards.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._passed.clear()

    @contextlib.contextmanager
    def _followed(self) -> Iterator[None]:
        """Follow operations inside."""
        if self._watching:
            yield
            return
        self._watching = True
        try:
            with uncompiled(), self:  # compiled code would not show its operations
                yield
        finally:
            self._watching = False

    @contextlib.contextmanager
    def checkpoints_explained(self) -> Iterator[None]:
        """Say what to do where checkpointing recomputes a function that no module's forward calls."""
        try:
            yield
        except CheckpointError as error:
            if not self._names:
                raise
            raise UnsupportedModelError(
                f"model: {self.engine.method} cannot run on it: a checkpointed function, not a module, reads one of "
                f"{', '.join(self._names.values())}; checkpoint the module whose forward reads it"
            ) from error

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._watching and torch._C._current_graph_task_id() == -1:  # not a recomputation
                for tensor in tensors_in((args, kwargs)):
                    self._remember(tensor, (), examples=True)
            if self.engine.ranks.in_step:
                self._note_gathered()
                args, kwargs = self._put_back(module, args, kwargs)
            with self._followed():
                return forward(*args, **kwargs)

        return watched

    def _note_gathered(self) -> None:
        """Take note of the full parameters that are in the place of shards now."""
        for parameters, own, name in self._places:
            parameter = parameters[own]
            if parameter is not None and parameter not in self._names:
                self._names.pop(self._gathered.get(name), None)  # type: ignore[arg-type]
                self._names[parameter], self._gathered[name] = name, parameter

    def _set_aside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return a sharded module's inputs with stand-ins for derived tensors; `None` if it has none.

        FSDP2 hands the forward others in the place of inputs that take a gradient, to see when their backward is over.
        """
        self._passed.pop(module, None)
        found = [t if self.is_derived(t) else None for t in tensors_in((args, kwargs))]
        if not any(t is not None for t in found):
            return None
        self._passed[module] = found

        def stand_in(tensor: Tensor) -> Tensor:
            return tensor.detach() if self.is_derived(tensor) else tensor

        return map_nested(args, stand_in), map_nested(kwargs, stand_in)

    def _put_back(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a sharded module's inputs with the derived tensors it was called with, in the dtype they have now."""
        if module not in self._passed:
            return args, kwargs
        pending = iter(self._passed.pop(module))

        def choose(tensor: Tensor) -> Tensor:
            derived = next(pending, None)
            if derived is None or derived.dtype == tensor.dtype:
                return tensor if derived is None else derived
            cast: Tensor = self.run(Tensor.to, derived, tensor.dtype)
            return cast

        return map_nested(args, choose), map_nested(kwargs, choose)

    # --- what an operation does ------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, *args, **(kwargs or {}))

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation, and remember whether its result is derived, constant or the examples'."""
        tensors = list(tensors_in((args, kwargs)))
        sources = self.sources(tensors)
        examples = any(self.is_example(tensor) for tensor in tensors)
        if sources and not torch.is_grad_enabled():  # what is made here may be made again, and read, with a graph
            self.expect(sources, math.inf)
            sources = ()
        if sources and examples:
            self._require_gathered(sources)
            result = combine(self, func, args, kwargs)
        else:
            with _kept_as_they_are() if sources else contextlib.nullcontext():
                result = func(*args, **kwargs)
        for tensor in tensors_in((result, args[:1] if mutates(func) else ())):
            if not (sources and examples and self.is_derived(tensor)):  # what has taken but a shape still is derived
                self._remember(tensor, sources, examples=examples)
        return result

    def _remember(self, tensor: Tensor, sources: tuple[nn.Parameter, ...], *, examples: bool) -> None:
        if tensor in self._names:
            return
        for table in (self._derived, self._examples):
            if tensor in table:
                del table[tensor]
        if examples and not tensor.requires_grad:
            self._examples[tensor] = True
        elif sources and not examples and tensor.requires_grad:
            self._derived[tensor] = sources

    def is_derived(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a raw parameter, or made of some and differentiable."""
        return tensor in self._names or (tensor.requires_grad and tensor in self._derived)

    def is_example(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds examples, as far as is known."""
        return not self.is_derived(tensor) and (tensor.requires_grad or tensor in self._examples)

    def sources(self, tensors: Iterable[Tensor]) -> tuple[nn.Parameter, ...]:
        """Return the raw parameters that some tensors are made of."""
        found: dict[nn.Parameter, None] = {}
        for tensor in tensors:
            if tensor in self._names:
                found[tensor] = None  # type: ignore[index]
            elif self.is_derived(tensor):
                found.update(dict.fromkeys(self._derived[tensor]))
        return tuple(found)

    def _require_gathered(self, sources: Iterable[nn.Parameter]) -> None:
        """Refuse what is made of a shard: the module that holds it does not run now."""
        for source in sources:
            if hasattr(source, "device_mesh"):
                raise UnsupportedModelError(
                    f"model: parameter {self._names[source]} is read while FSDP2 has not gathered it; read it in the "
                    f"forward of the module that was sharded with it, or shard it with the module that reads it"
                )

    # --- for operations --------------------------------------------------------------------------------------

    def read(self, value: Tensor, rows: int, rank: int) -> Tensor:
        """Return a derived tensor with a copy for each of `rows` examples, of `rank` dimensions."""
        return read(self, value, self.sources([value]), rows, rank)

    def expect(self, parameters: Iterable[nn.Parameter], reads: float = 1) -> None:
        """Tell the engine of reads to come."""
        self.engine.expect([self._attached[self._names[parameter]] for parameter in parameters], reads)

    def receive_rows(self, parameter: nn.Parameter, part: Contribution, leading: int) -> None:
        """Hand the engine what one read contributes."""
        self.engine.receive_rows(self._attached[self._names[parameter]], part, leading)

    def entering(self, x: Any) -> Any:
        """Return a layer's input: a derived one is read here, as a layer's first dimension is the examples'."""
        if not self._names or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return x
        if x.dim() == 0 or not self.is_derived(x):
            return x
        return self.read(x, x.shape[0], x.dim())

    def as_layer(
        self, rule: Rule, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, **options: Any
    ) -> Tensor:
        """Run an operation on raw parameters by the rule of the layer it amounts to."""
        key = (rule, weight, bias, *sorted(options.items()))
        if key not in self._layers:
            module = types.SimpleNamespace(weight=weight, bias=bias, **options)
            reason = rule.check(module)
            if reason is not None:
                raise UnsupportedModelError(
                    f"model: {self.engine.method} cannot run on {self._names[weight]}: {reason}"
                )
            layer = self.engine.layer(self._names[weight], module, rule)
            layer.weight = self._attached[self._names[weight]]
            layer.bias = None if bias is None else self._attached[self._names[bias]]
            self._layers[key] = layer
        return self.engine.call(self._layers[key], x)

    def raw(self, tensor: Tensor | None) -> nn.Parameter | None:
        """Return a tensor that is a raw parameter itself."""
        return tensor if isinstance(tensor, nn.Parameter) and tensor in self._names else None

    def transposed(self, tensor: Tensor) -> nn.Parameter | None:
        """Return the raw matrix whose plain transpose a tensor is."""
        base = self.raw(tensor._base)
        if base is None or base.dim() != 2 or not self.is_derived(tensor):
            return None
        same = tensor.shape == base.shape[::-1] and tensor.stride() == base.stride()[::-1]
        return base if same and tensor.storage_offset() == base.storage_offset() else None

    def refuse(self, func: Callable[..., Any], tensors: Iterable[Tensor], reason: str) -> UnsupportedModelError:
        """Return the error for an operation that has no per-example gradient here."""
        names = ", ".join(self._names[parameter] for parameter in self.sources(tensors))
        operation = getattr(func, "__name__", str(func)).strip("_")
        return UnsupportedModelError(
            f"model: {self.engine.method} cannot run on parameter {names}: {operation} {reason}; combine it with the "
            f"examples by broadcasting, cat, where or a matrix product, use a layer, or freeze it"
        )


def _kept_as_they_are() -> contextlib.AbstractContextManager[Any]:
    """Return a scope in which checkpointing drops nothing: derivations are small and differentiated by example."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def raw_parameters(model: nn.Module, covered: Callable[[nn.Module, str], bool]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that `covered(module, name)` denies to a layer's rule, by their full name."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not covered(module, name):
                found[f"{prefix}.{name}" if prefix else name] = parameter
    return found
