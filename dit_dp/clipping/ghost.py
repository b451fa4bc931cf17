"""Two-pass ghost clipping: norms in a first backward, the clipped sum in a second.

Li, Tramer, Liang and Hashimoto, "Large language models can be strong differentially private learners"
(arXiv 2110.05679), section 4; mixed with direct norms where those are cheaper (Bu, Mao and Xu, arXiv
2205.10683). One forward; the first backward computes input gradients and per-example norms, never a parameter's
gradient; the second back-propagates ``min(1, C / |g_i|) loss_i`` as ordinary training would.

Cost over ordinary training: one more set of input gradients (a third of its FLOPs), and the norms, the
smaller of T^2 (d + p) and T d p multiply-adds a layer and example. Memory: what ordinary training holds, and
one layer's Gram matrices (N 2 T^2, at most 64 MiB or one example's).
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import clip_factors
from dit_dp.clipping.engine import Engine, LayerRule, memory_scope
from dit_dp.clipping.rules import COUPLED, Contribution, Outer, Rule, joined_squared_norms, rule_for
from dit_dp.errors import UnsupportedModelError


class _Layer:
    """A covered module: its name, its rule and the engine that watches it."""

    def __init__(self, name: str, module: nn.Module, rule: Rule, engine: "GhostEngine") -> None:
        self.name, self.module, self.rule, self.engine = name, module, rule, engine
        self.weight: nn.Parameter | None = getattr(module, "weight", None)
        self.bias: nn.Parameter | None = getattr(module, "bias", None)

    def trainable(self) -> list[nn.Parameter]:
        """Return its parameters that take gradients."""
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]


class _WatchedCall(torch.autograd.Function):
    """One call of a layer, whose backward gives norms in the first pass and gradients in the second."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: _Layer,
        lowered: torch.dtype | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.layer, ctx.lowered = layer, lowered
        ctx.save_for_backward(x, weight)
        return layer.rule.compute(layer.module, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        layer: _Layer = ctx.layer
        x, weight = ctx.saved_tensors
        lowered = weight if weight is None or ctx.lowered is None else weight.to(ctx.lowered)
        needs_input, *needed = ctx.needs_input_grad[2:]
        grad_x = layer.rule.input_gradient(layer.module, x, lowered, g) if needs_input else None
        if layer.engine.measuring:
            layer.engine.observe(layer, x, g)
            return None, None, grad_x, None, None
        x, g = layer.engine.without_dropped(x, g)
        grad_weight, grad_bias = layer.rule.parameter_gradients(layer.module, x, lowered, g, (needed[0], needed[1]))
        return None, None, grad_x, _like(grad_weight, layer.weight), _like(grad_bias, layer.bias)


def _like(gradient: Tensor | None, parameter: nn.Parameter | None) -> Tensor | None:
    """Return a gradient in its parameter's dtype."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks for on this tensor's device, if it is on and the tensor floats."""
    device = x.device.type
    active = torch.is_autocast_enabled(device) and (x.is_floating_point() and x.dtype != torch.float64)
    return torch.get_autocast_dtype(device) if active else None


class GhostEngine(Engine):
    """Exact flat clipping of any model made of the layers in `rules.RULES`.

    Handles modules called more than once, tied and frozen parameters, activation checkpointing and autocast
    (norms in float32). A trainable parameter that no rule covers is an error, never a silent zero.

    **Guarantees**: adds at most C per example to the sum, up to the rounding of that example's own operands: below
    1e-4 C in float32; under bf16 autocast a few 1e-3 C, because the second pass rounds again. Sums over examples
    are taken in float32. **Edge cases**:
    an example whose norm is not finite is dropped and its operands masked, so that weights stay finite.
    """

    def _attach(self) -> None:
        self.measuring = False
        self._squares: Tensor | None = None
        self._keep: Tensor | None = None
        self._in_backward = False
        self._calls: dict[nn.Parameter, int] = {}
        self._parts: dict[nn.Parameter, list[Contribution]] = {}
        self._rules_used: dict[str, str] = {}
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self._layers = cover(self.model, self)
        for layer in self._layers:
            layer.module.forward = types.MethodType(_watched_forward(layer), layer.module)

    def _detach(self) -> None:
        for layer in self._layers:
            del layer.module.forward

    def _finish(self, losses: Tensor) -> Tensor:
        self._announce("backward")
        self._in_backward = True
        self._squares = losses.new_zeros(losses.shape[0], dtype=torch.promote_types(losses.dtype, torch.float32))
        try:
            self._measure(losses)
            self._announce("clip")
            norms = self._squares.sqrt()
            factors = clip_factors(norms, self.max_grad_norm)
            finite = torch.isfinite(norms)
            self._keep = None if bool(finite.all()) else finite
            torch.autograd.backward(losses, factors.to(losses.dtype))
        finally:
            self._in_backward = False
            self._squares = self._keep = None
            self._calls.clear()
            self._parts.clear()
        return norms

    def _measure(self, losses: Tensor) -> None:
        """Back-propagate for norms alone; what reaches `.grad` meanwhile went past the layers."""
        earlier = {name: p.grad for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        try:
            self.measuring = True
            torch.autograd.backward(losses, torch.ones_like(losses), retain_graph=True)
            foreign = [name for name, p in self.parameters.items() if p.grad is not None]
        finally:
            self.measuring = False
            for name, parameter in self.parameters.items():
                parameter.grad = earlier[name]
        if foreign:
            raise UnsupportedModelError(
                f"model: parameter {foreign[0]} is used outside its layer's forward, so its per-example gradient "
                f"is unknown; call the layer instead of reading its weight, or freeze it"
            )
        for parameter in list(self._parts):  # a call whose output the loss does not use
            self._take_norm(parameter)

    # --- called by layers -----------------------------------------------------------------------------------

    def expect(self, layer: _Layer) -> None:
        """Count a call in the forward pass; recomputation under checkpointing does not count."""
        if not self._in_backward:
            for parameter in layer.trainable():
                self._calls[parameter] = self._calls.get(parameter, 0) + 1

    def observe(self, layer: _Layer, x: Tensor, g: Tensor) -> None:
        """Take what one call contributes; take a parameter's norm once all its calls were seen."""
        assert self._squares is not None
        if x.shape[0] != self._squares.shape[0]:
            raise UnsupportedModelError(
                f"model: layer {layer.name} got an input whose first dimension is {x.shape[0]}, but there are "
                f"{self._squares.shape[0]} examples; make the first dimension the examples'"
            )
        with memory_scope():
            parts = layer.rule.contributions(layer.module, x, g)
            for parameter, part in zip((layer.weight, layer.bias), parts, strict=True):
                if parameter is None or part is None:
                    continue
                self._parts.setdefault(parameter, []).append(part)
                self._calls[parameter] = self._calls.get(parameter, 1) - 1
                if self._calls[parameter] <= 0:
                    self._take_norm(parameter)

    def without_dropped(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return a call's operands with the rows of dropped examples set to zero."""
        if self._keep is None:
            return x, g
        keep = self._keep.view(-1, *[1] * (g.dim() - 1))
        x = x if not x.is_floating_point() else torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, 0)
        return x, torch.where(keep, g, 0)

    def _take_norm(self, parameter: nn.Parameter) -> None:
        assert self._squares is not None
        parts = self._parts.pop(parameter)
        if all(isinstance(part, Outer) for part in parts):
            positions = sum(part.a.shape[1] for part in parts if isinstance(part, Outer))
            self._rules_used[self._names[parameter]] = Outer.rule(positions, parameter[0].numel(), parameter.shape[0])
        self._squares += joined_squared_norms(parts, parameter.shape)

    # --- what people ask ------------------------------------------------------------------------------------

    def choices(self) -> dict[str, Any]:
        """Return how many weights used which norm rule in the last step."""
        counts: dict[str, int] = {}
        for rule in self._rules_used.values():
            counts[rule] = counts.get(rule, 0) + 1
        return {"norm_rules": dict(sorted(counts.items()))}

    @classmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return the rule by type; whether a linear is `ghost` or `direct` depends on its shapes."""
        reason = refusal(module)
        if reason is not None:
            return "none", reason
        rule = rule_for(module)
        assert rule is not None
        if rule.name == "embedding":
            return "embedding", "rows only"
        if rule.name == "norm":
            return "direct", "as small as the parameters"
        return "ghost", "or direct or outer product, whichever needs fewer operations at its shape"


def _watched_forward(layer: _Layer) -> Callable[..., Tensor]:
    """Return the forward that replaces a module's own while the engine is attached."""
    original = type(layer.module).forward

    def forward(module: nn.Module, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            result: Tensor = original(module, input)
            return result
        layer.engine.expect(layer)
        x = layer.rule.prepare(module, input)
        lowered = None if layer.rule.name == "norm" else _autocast_dtype(x)
        x = x if lowered is None else x.to(lowered)
        output: Tensor = _WatchedCall.apply(layer, lowered, x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return output

    return forward


def refusal(module: nn.Module) -> str | None:
    """Return why a module with parameters of its own (or that couples examples) is not covered, or `None`."""
    if isinstance(module, COUPLED):
        return "it mixes the examples of a batch; use GroupNorm or LayerNorm"
    raw = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    rule = rule_for(module)
    if rule is None:
        names = ", ".join(raw)
        return (
            f"no rule for {type(module).__name__} with parameters of its own ({names}); "
            f"build it of Linear, Conv2d, Embedding and norm layers, or freeze them"
        )
    if set(raw) - {"weight", "bias"}:
        return f"extra parameters {', '.join(sorted(set(raw) - {'weight', 'bias'}))}; move them to a layer of their own"
    return rule.check(module)


def cover(model: nn.Module, engine: GhostEngine) -> list[_Layer]:
    """Find a rule for every trainable parameter.

    Raises:
        UnsupportedModelError: Some module has none; names it, the reason and the fix.
    """
    layers = []
    for name, module in model.named_modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, COUPLED) or trains:
            reason = refusal(module)
            if reason is not None:
                raise UnsupportedModelError(f"model: ghost cannot run on layer {name or '(root)'}: {reason}")
        if trains:
            rule = rule_for(module)
            assert rule is not None
            layers.append(_Layer(name, module, rule, engine))
    return layers
