"""What Opacus gets wrong or cannot run, found before it does: statically, and in the first forward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.graph import parameter_uses
from dit_dp.clipping.rules import COUPLED
from dit_dp.errors import UnsupportedModelError

_ONE_READ_A_CALL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
"""Layers whose forward reads each of their parameters once."""


def refusal(module: nn.Module) -> str | None:
    """Return why Opacus cannot, or cannot correctly, run on a layer, or `None`."""
    if isinstance(module, COUPLED):  # Opacus 1.6.0 refuses running statistics only, and those only if it trains
        return "it mixes the examples of a batch; use GroupNorm or LayerNorm"
    if list(module.buffers(recurse=False)):
        return "Opacus supports no trainable layer with buffers; freeze it, or use a layer without"
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        return "its sampler gives the padding row a gradient (seen in 1.6.0); set padding_idx=None, or use ghost"
    return None


LACKS_BIAS = "its LayerNorm sampler needs a bias (seen in 1.6.0); use opacus-functorch, or bias=True"


def lacks_bias(module: nn.Module) -> bool:
    """Return whether a layer is a LayerNorm with a scale and no shift, on which Opacus's sampler crashes."""
    return isinstance(module, nn.LayerNorm) and module.elementwise_affine and module.bias is None


def want_contiguous_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    """Make the gradient of a convolution's output contiguous: PyTorch's rule for it calls `view`."""
    if output.requires_grad:
        output.register_hook(lambda g: g.contiguous())  # type: ignore[no-untyped-call]


def refuse_flat_indices(name: str) -> Callable[[nn.Module, Any], None]:
    """Return a hook that refuses indices of shape (N,), for which PyTorch's rule raises deep inside."""

    def hook(module: nn.Module, args: Any) -> None:
        if args[0].dim() < 2 and torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"model: opacus-ew cannot run on layer {name}: ExpandedWeights needs embedding indices of at least "
                f"two dimensions and got {tuple(args[0].shape)}; look up y[:, None], or use opacus"
            )

    return hook


def refuse_shared_modules(model: nn.Module, method: str) -> None:
    """Refuse a layer that is registered under two names: Opacus hooks it twice and counts its gradient twice."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if trains and names.setdefault(module, name) != name:
            raise UnsupportedModelError(
                f"model: {method} cannot run on layer {name}: it is the same module as {names[module]}, and Opacus "
                f"counts its gradient once for each name; use ghost"
            )


def hooked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what Opacus hooks: modules that train, without what is inside one that it takes as a whole by vmap."""
    from opacus.grad_sample import GradSampleModule

    whole: str | None = None
    for name, module in model.named_modules():
        inside = whole is not None and (not whole or name.startswith(f"{whole}."))
        if inside or not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        yield name, module
        if type(module) not in GradSampleModule.GRAD_SAMPLERS:
            whole = name


def refuse_inputs_hooks_miss(name: str, method: str) -> Callable[..., None]:
    """Return a hook that refuses calls by keyword or with several inputs, with which Opacus's own raise a TypeError."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and (kwargs or len(args) != 1):
            raise UnsupportedModelError(
                f"model: {method} cannot run on layer {name or '(root)'}: it is called with "
                f"{len(args) + len(kwargs)} inputs, {len(kwargs)} of them by keyword, and Opacus's hooks see one "
                f"input by position; pass one so, or use ghost"
            )

    return hook


class FirstForward:
    """Counts the calls of each layer until it is stopped, and compares them with the graph.

    Opacus's hooks know a layer's own calls alone: where a weight is read past them, the norm or the per-example
    gradient misses that part, and the clipped sum is wrong without a word.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self._model, self._method = model, method
        self._calls: Counter[str] = Counter()
        self._handles = [
            module.register_forward_pre_hook(self._count(name))
            for name, module in model.named_modules()
            if isinstance(module, _ONE_READ_A_CALL)
        ]
        if method != "opacus-ew":
            self._handles += [
                module.register_forward_pre_hook(refuse_inputs_hooks_miss(name, method), with_kwargs=True)
                for name, module in hooked(model)
            ]

    def _count(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
                raise UnsupportedModelError(
                    f"model: {self._method} cannot run on layer {name}: it is called inside an activation checkpoint, "
                    f"which runs hooks twice; use ghost"
                )
            if torch.is_grad_enabled():
                self._calls[name] += 1

        return hook

    def refuse_reads_past_layers(self, losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise `UnsupportedModelError` if a graph reads a layer's weight more often than the layer was called."""
        uses = parameter_uses(losses, parameters)
        owners: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            owners.setdefault(parameter, []).append(name.rpartition(".")[0])
        for name, parameter in parameters.items():
            layers = [self._model.get_submodule(layer) for layer in owners[parameter]]
            calls = sum(self._calls[layer] for layer in owners[parameter])
            if all(isinstance(layer, _ONE_READ_A_CALL) for layer in layers) and uses[name] > calls:
                raise UnsupportedModelError(
                    f"model: {self._method} cannot run on it: parameter {name} is used outside its layer's forward; "
                    f"call the layer instead of reading its weight, or freeze it"
                )

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
