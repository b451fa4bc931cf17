"""Layers under watch: what `ghost` and `bookkeeping` share.

While an engine is attached, each covered module's forward is replaced by one that runs `_WatchedCall`. Its
backward computes the input's gradient and hands the layer's input and output gradient to the engine; no gradient of
the batch's summed loss is ever formed. The engine takes norms from what it is handed until it knows the clip factors,
and clipped sums from then on.
"""

import contextlib
import types
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.apart import Look, can_walk_again
from dit_dp.clipping.batch import Batch, LossFn, clip_factors, gradients_aside
from dit_dp.clipping.compiled import compiling, outside_graphs, uncompiled, walking_twice
from dit_dp.clipping.contributions import Contribution
from dit_dp.clipping.coverage import covered, layers_to_watch, read_elsewhere, refusal
from dit_dp.clipping.engine import Engine, LayerRule
from dit_dp.clipping.gathered import reshard
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.lives import Trial
from dit_dp.clipping.precision import autocast_dtype, full_float32
from dit_dp.clipping.probe import Prober
from dit_dp.clipping.raw import RawParameters, raw_parameters
from dit_dp.clipping.rules import Rule, rule_for
from dit_dp.clipping.units import Units, with_zero_units
from dit_dp.errors import CoupledExamplesError, EngineStateError, LossShapeError, UnsupportedModelError, UsageError


class WatchedLayer:
    """A covered module, or what stands for one: its name, its rule, the engine that watches it, and whether it does."""

    def __init__(self, name: str, module: Any, rule: Rule, engine: "WatchedEngine") -> None:
        self.name, self.module, self.rule, self.engine = name, module, rule, engine
        self.weight, self.bias = self.current()
        self.is_watched = True

    def current(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Return weight and bias as they are in the module now: FSDP2 replaces its shards by them while it runs."""
        return getattr(self.module, "weight", None), getattr(self.module, "bias", None)

    def trainable(self) -> list[nn.Parameter]:
        """Return its parameters that take gradients."""
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]


class _WatchedCall(torch.autograd.Function):
    """One call of a layer, whose backward asks the engine for the parameters' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: WatchedLayer,
        lowered: torch.dtype | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.layer, ctx.lowered = layer, lowered
        ctx.save_for_backward(x, weight)
        with torch._C.DisableTorchFunction():
            return layer.rule.compute(layer.module, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        layer: WatchedLayer = ctx.layer
        x, weight = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            lowered = weight if weight is None or ctx.lowered is None else weight.to(ctx.lowered)
            grad_x = layer.rule.input_gradient(layer.module, x, lowered, g) if ctx.needs_input_grad[2] else None
            layer.engine.observe(layer, x, g)
        return None, None, grad_x, None, None


class WatchedEngine(Engine):
    """A method that sees the input and the output gradient of every call of every layer.

    Handles modules called more than once, tied and frozen parameters, activation checkpointing and autocast
    (norms in float32). A trainable parameter that no rule covers is an error, never a silent zero.
    """

    method: ClassVar[str]
    walks_twice: ClassVar[bool] = False
    """Whether the graph is walked once for the norms and once more for the sum."""
    unfolds_trials: ClassVar[bool] = False
    """Whether plans are made from trials, which then say what kept graphs would have held."""

    def _attach(self) -> None:
        self._prober: Prober | None = None
        self._look: Look | None = None
        self._num_tried = self._rows_of_a_unit = 0
        self._graph_examined = self._in_backward = False
        self._loss_weight = 1.0
        self._squares: Tensor | None = None
        self._factors: Tensor | None = None
        self._finite: Tensor | None = None
        self._all_finite: Callable[[], bool] = lambda: True
        self._calls: dict[nn.Parameter, float] = {}
        self._parts: dict[nn.Parameter, list[Contribution]] = {}
        self._rules_used: dict[str, str] = {}
        self._names = {parameter: name for name, parameter in self.model_parameters.items()}
        self._layers = [WatchedLayer(*found, self) for found in layers_to_watch(self.model, self.method)]
        for layer in self._layers:
            layer.module.__dict__[_LAYER] = layer
            layer.module.forward = types.MethodType(_KEPT_OUT, layer.module)
        self.raw = RawParameters(self, raw_parameters(self.model, covered))
        self.raw.attach(self.model, {layer.module for layer in self._layers})

    def _detach(self) -> None:
        self.raw.detach()
        for layer in self._layers:
            del layer.module.forward, layer.module.__dict__[_LAYER]

    def _finish(self, losses: Tensor) -> Tensor:
        self._announce("backward")
        self._in_backward = True
        try:
            with self.raw.checkpoints_explained():
                self._take_norms(losses)
            self._announce("clip")
            norms = self._weigh()
            with torch.no_grad():
                self._sum(losses)
            dropped = self._kept_units()
            self.num_dropped += 0 if dropped is None else int((~dropped).sum())
        finally:
            self._forget()
        return norms

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        if self.ranks.in_step and self._rows_of_a_unit == 0:
            self._rows_of_a_unit = max(self.ranks.gather(units.rows_of_first))
            if self._rows_of_a_unit == 0:  # no rank has a unit yet, so none waits for another
                reshard(self.model)  # no backward will
                return self._accumulate_nothing()
        if units.num_units == 0:
            return self._take_part(loss_fn, batch, units)
        several = min(units.num_units, 2)
        if self._num_tried >= several:
            return self._take(loss_fn, batch, units)
        try:
            self._try(loss_fn, batch, units)
        except CoupledExamplesError:
            raise
        except (UsageError, RuntimeError, IndexError) as error:
            self._forget()
            self._take(loss_fn, batch, units)  # what fails on the whole batch too is said in its terms
            raise LossShapeError(
                f"loss: it fails on some of {units.num_units} units ({error}); accepted: a function of any number of "
                f"units; take sizes from the batch it is given"
            ) from error
        self._num_tried = 2 if self.ranks.in_step else several
        return self._take(loss_fn, batch, units)

    def _take(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        """Run forward and backward on the batch; a method may take it in parts."""

        def forward(model: nn.Module, batch: Batch) -> Tensor:
            with compiling(walked_twice=self.walks_twice):
                return loss_fn(model, batch)

        self._calls.clear()  # a forward without a graph, between steps, was counted
        return super()._accumulate(forward, batch, units)

    def _take_part(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor:
        """Run a unit of zeros whose loss has weight 0: ranks that have units need this one's part in what they send."""
        num_dropped, self._loss_weight = self.num_dropped, 0.0
        try:
            norms = self._accumulate(loss_fn, *with_zero_units(batch, units, 1, self._rows_of_a_unit))
        finally:
            self.num_dropped, self._loss_weight = num_dropped, 1.0
        assert norms is not None
        return norms[:0]

    def _try(self, loss_fn: LossFn, batch: Batch, units: Units) -> None:
        """Refuse a model whose units do not keep apart, once there are two."""
        if self.ranks.in_step:
            batch, units = with_zero_units(batch, units, 2, units.rows_of_first or self._rows_of_a_unit)
        if units.num_units > 1 and hardware().has_data:
            self._run_trial(loss_fn, batch, units, 2, alone=True)
            with uncompiled():
                self._new_prober().compare(self.model, loss_fn, batch, units)

    def _examine(self, losses: Tensor) -> None:
        """Refuse, once, losses whose graph does not keep two of them apart.

        Weaker than `_try`, which the first `accumulate` still runs: what mixes rows before the first layer, or without
        a gradient, is not seen.
        """
        if self._graph_examined or self._num_tried == 2 or not hardware().has_data:
            return
        if self.ranks.all_agree(len(losses) == 1) or not self.ranks.all_agree(
            can_walk_again(losses, walks_twice=self.walks_twice) and bool(torch.isfinite(losses).all())
        ):
            return
        calls, self._in_backward, look = dict(self._calls), True, Look()
        try:
            self._look = look
            with self.raw.checkpoints_explained():
                for unit in (0, len(losses) - 1):
                    look.walk(losses, unit, self.method)
        finally:
            self._look = None
            self._forget()
        self._calls.update(calls)
        if not self.ranks.all_agree(look.error is None):
            raise look.error or CoupledExamplesError(
                "model: the loss of one example depends on another's rows on a rank"
            )
        self._graph_examined = True

    def _run_trial(self, loss_fn: LossFn, batch: Batch, units: Units, count: int, *, alone: bool = False) -> Trial:
        """Take the first units through forward and backward and return what was seen."""
        _, self._units = units.take(batch, 0, count)
        with uncompiled():
            trial = self._new_prober().run(self.model, loss_fn, batch, units, count, alone=alone)
        self._forget()
        return trial

    def _new_prober(self) -> Prober:
        def report_to(prober: Prober | None) -> None:
            self._prober = prober

        return Prober(self._names, report_to, self.ranks.all_agree, unfolds=self.unfolds_trials)

    @classmethod
    @abstractmethod
    def norm_rule(cls, positions: int, width: int, out_width: int) -> tuple[LayerRule, str]:
        """Return how a (p, d) weight's norm over T positions is taken by default, and why."""

    @abstractmethod
    def _settle(self, parameter: nn.Parameter, parts: list[Contribution]) -> None:
        """Take a parameter's norm, all of whose calls were seen."""

    @abstractmethod
    def _sum(self, losses: Tensor) -> None:
        """Add the clipped sum to `.grad`; factors are known."""

    def _take_norms(self, losses: Tensor) -> None:
        """Back-propagate the sum of losses; what reaches `.grad` meanwhile went past the layers."""
        parameters = self.model_parameters
        self._squares = losses.new_zeros(losses.shape[0], dtype=torch.promote_types(losses.dtype, torch.float32))
        with gradients_aside(parameters.values()):
            with walking_twice(losses, self.method) if self.walks_twice else contextlib.nullcontext():
                weights = torch.full_like(losses, self._loss_weight)
                torch.autograd.backward(losses, weights, retain_graph=self.walks_twice)
            past = [(p, p.grad) for p in parameters.values() if p.grad is not None]
        with torch.no_grad(), full_float32():
            for parameter, gradient in past:
                self._take_past(parameter, gradient)
            for parameter in list(self._parts):  # a call whose output the loss does not use
                self._settle(parameter, self._parts.pop(parameter))

    def _take_past(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Take a gradient that went past the layers; refused, since of several units only the sum is known."""
        raise read_elsewhere(self._names[parameter])

    def _weigh(self) -> Tensor:
        """Turn the squared norms into clip factors; return the norms, (U,)."""
        assert self._squares is not None
        norms = self._squares.sqrt()
        self._finite = torch.isfinite(norms)
        self._all_finite = hardware().later(self._finite.all(), usually=True)
        self._factors = clip_factors(norms, self.max_grad_norm)
        return norms

    def _kept_units(self) -> Tensor | None:
        """Return which units' norms are finite, (U,), or `None`: all."""
        return None if self._all_finite() else self._finite

    def _add(self, parameter: nn.Parameter, part: Contribution) -> None:
        """Add a contribution's clipped sum over units to the gradient; called within `full_float32`."""
        assert self._factors is not None
        target = self.parameters[self._names[parameter]]
        so_far = None if self.ranks.in_step else target.grad
        total = part.add_clipped(so_far, self._factors, parameter.shape, self._kept_units)
        if self.ranks.in_step:
            self._deposit(parameter, total)
        else:
            target.grad = total.to(target.dtype)

    def _deposit(self, parameter: nn.Parameter, total: Tensor) -> None:
        """Add a clipped sum of the parameter's full shape to the gradient, or this rank's share of all ranks'."""
        self._add_share(parameter, self.ranks.share(self.parameters[self._names[parameter]], total))

    def _add_share(self, parameter: nn.Parameter, share: Tensor) -> None:
        """Add this rank's share of a clipped sum to the gradient."""
        target = self.parameters[self._names[parameter]]
        target.grad = share.to(target.dtype) if target.grad is None else target.grad.add_(share)

    def _forget(self) -> None:
        """Drop what one pass left behind, also after a failure."""
        self._in_backward = False
        self._squares = self._factors = self._finite = None
        self._calls.clear()
        self._parts.clear()

    # --- called by layers -----------------------------------------------------------------------------------

    def layer(self, name: str, module: Any, rule: Rule) -> WatchedLayer:
        """Return what stands for a layer in operations on raw parameters."""
        return WatchedLayer(name, module, rule, self)

    def call(self, layer: WatchedLayer, x: Tensor) -> Tensor:
        """Run one call of a layer under watch."""
        self.expect(layer.trainable())
        x = layer.rule.prepare(layer.module, x)
        lowered = None if layer.rule.name == "norm" else autocast_dtype(x)
        x = x if lowered is None else x.to(lowered)
        output: Tensor = _WatchedCall.apply(layer, lowered, x, *layer.current())  # type: ignore[no-untyped-call]
        return output

    def expect(self, parameters: Iterable[nn.Parameter], reads: float = 1) -> None:
        """Count calls in the forward pass, infinity if unknown; recomputation under checkpointing does not count."""
        if not self._in_backward:
            for parameter in parameters:
                self._calls[parameter] = self._calls.get(parameter, 0) + reads

    def observe(self, layer: WatchedLayer, x: Tensor, g: Tensor) -> None:
        """Take what one call of a layer contributes."""
        self._require_own_backward(layer.name)
        with hardware().norm_scope(), full_float32():
            parts = layer.rule.contributions(layer.module, x, g)
            for parameter, part in zip((layer.weight, layer.bias), parts, strict=True):
                if parameter is not None and part is not None:
                    self.receive(parameter, self._by_unit(layer.name, part, x.shape[0]))

    def receive_rows(self, parameter: nn.Parameter, part: Contribution, leading: int) -> None:
        """Take what one read of a raw parameter contributes, with `leading` rows."""
        self._require_own_backward(self._names[parameter])
        self.receive(parameter, self._by_unit(self._names[parameter], part, leading))

    def receive(self, parameter: nn.Parameter, part: Contribution) -> None:
        """Take one contribution, (U, ...): for the norm, or for the sum once factors are known."""
        if self._prober is not None:
            self._prober.saw(parameter, part)
            return
        if self._look is not None:
            self._look.saw(self._names[parameter], part)
            return
        if self._factors is not None:
            self._add(parameter, part)
            return
        self._parts.setdefault(parameter, []).append(part)
        self._calls[parameter] = self._calls.get(parameter, 1) - 1
        if self._calls[parameter] <= 0:
            self._settle(parameter, self._parts.pop(parameter))

    def _require_own_backward(self, name: str) -> None:
        """Refuse a backward that the engine does not run: whatever it reached would be no part of the sum."""
        if not self._in_backward and self._prober is None:
            raise EngineStateError(
                f"backward: it reached {name}, which {self.method} is attached to, from outside the engine; give the "
                f"per-example losses to the engine's backward, or call its detach first"
            )

    def _by_unit(self, name: str, part: Contribution, leading: int) -> Contribution:
        """Return a contribution of rows or units as one of units."""
        units = self._units
        if leading == units.num_units:
            return part
        if leading == units.num_rows:
            return part.by_unit(units)
        counts = f"{units.num_units} examples"
        if units.row_to_unit is not None:
            counts = f"{units.num_rows} rows of {units.num_units} units"
        raise UnsupportedModelError(
            f"model: layer {name} got an input whose first dimension is {leading}, but there are {counts}; "
            f"make the first dimension the examples'"
        )

    # --- what people ask ------------------------------------------------------------------------------------

    def choices(self) -> dict[str, Any]:
        """Return how many weights used which norm rule in the last step."""
        return {"norm_rules": dict(sorted(Counter(self._rules_used.values()).items()))}

    @classmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return the rule by type; whether a linear is `ghost` or `direct` depends on its shapes."""
        reason = refusal(module)
        if reason is not None:
            return "none", reason
        rule = rule_for(module)
        if rule is None:
            return "broadcast", "one copy an example where it meets them, per-example gradients of its own size"
        if rule.name == "embedding":
            return "embedding", "rows only"
        if rule.name == "norm":
            return "direct", "as small as the parameters"
        return "ghost", "or direct or outer product, whichever needs fewer operations at its shape"


_LAYER = "_dit_dp_layer"
"""Entry of a module's `__dict__` that holds its `WatchedLayer`."""


def _watched_forward(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """Stand in for a module's own forward while an engine is attached.

    One function for all layers: compiled code that calls it is valid for every block of a kind.
    """
    layer: WatchedLayer = module.__dict__[_LAYER]
    (x,) = (layer.engine.raw.entering(value) for value in (*args, *kwargs.values()))
    if layer.is_watched:
        if torch.is_grad_enabled():
            return layer.engine.call(layer, x)
        layer.engine.expect(layer.trainable())  # a block, for all we know, that will be recomputed
    result: Tensor = type(module).forward(module, x)
    return result


_KEPT_OUT = outside_graphs(_watched_forward)
