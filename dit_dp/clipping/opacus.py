"""Opacus as a peer: its own GradSampleModule and DPOptimizer clip, add noise and scale, unmodified.

Opacus is imported when one of these engines is attached. Its optimizer wraps a stand-in that holds the
parameters; the caller's optimizer takes the step, as `DPOptimizer.step` would have it do.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn
from dit_dp.clipping.contributions import HALF, float32
from dit_dp.clipping.engine import Engine, LayerRule
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.peer_checks import (
    LACKS_BIAS,
    FirstForward,
    lacks_bias,
    refusal,
    refuse_flat_indices,
    refuse_shared_modules,
    want_contiguous_gradient,
)
from dit_dp.clipping.rules import COUPLED
from dit_dp.clipping.units import Units
from dit_dp.errors import EngineStateError, UnsupportedModelError, UsageError

_EXPANDED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
"""Layers for which PyTorch's ExpandedWeights has a rule (torch/nn/utils/_expanded_weights)."""


def _scoped(base: type) -> type:
    """Return a subclass of an Opacus module whose norm and gradient hooks run inside a profiler range."""

    class Scoped(base):  # type: ignore[misc]
        def capture_backprops_hook(self, *args: Any, **kwargs: Any) -> Any:
            with hardware().norm_scope():
                return super().capture_backprops_hook(*args, **kwargs)

    return Scoped


class _OpacusBase(Engine):
    """What both ways of using Opacus share."""

    method: ClassVar[str]
    sums_in_grad: ClassVar[bool] = False
    held: ClassVar[tuple[tuple[str, str], ...]]
    """Attributes that Opacus hangs on parameters, with their category in a breakdown."""
    _num_examples: int

    def _attach(self) -> None:
        for name, parameter in self.model_parameters.items():
            if parameter.dtype in HALF:
                raise UnsupportedModelError(
                    f"model: {self.method} would add up in {parameter.dtype} what {name} gets; use float32 parameters "
                    f"and bf16 autocast, or a method of ours"
                )
        refuse_shared_modules(self.model, self.method)
        for name, module in self.model.named_modules():
            trains = any(p.requires_grad for p in module.parameters(recurse=False))
            if trains or isinstance(module, COUPLED):
                rule, reason = self.layer_rule(module)
                if rule == "none":
                    raise UnsupportedModelError(
                        f"model: {self.method} cannot run on layer {name or '(root)'}: {reason}"
                    )
        try:
            self._wrapped = self._wrap()
        except NotImplementedError as error:
            raise UnsupportedModelError(f"model: Opacus refuses it: {' '.join(str(error).split())}") from error
        self._first_forward: FirstForward | None = FirstForward(self.model, self.method)
        self._optimizer = self._make_optimizer(torch.optim.SGD(self.parameters.values(), lr=0.0))

    @classmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return `none` for what Opacus cannot run on or gets wrong, else how it samples the layer."""
        reason = refusal(module)
        return ("none", reason) if reason is not None else cls._sampler(module)

    @classmethod
    @abstractmethod
    def _sampler(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return how Opacus obtains the norm of a layer it can run on."""

    @abstractmethod
    def _wrap(self) -> Any:
        """Return Opacus's wrapper around the model."""

    @abstractmethod
    def _make_optimizer(self, stand_in: torch.optim.Optimizer) -> Any:
        """Return Opacus's optimizer around one that holds the parameters."""

    def _callable_model(self) -> nn.Module:
        wrapped: nn.Module = self._wrapped
        return wrapped

    def _begin(self) -> None:
        if not self.model.training:
            raise EngineStateError("model: Opacus needs it in training mode; call model.train()")
        super()._begin()
        if self._state == "accumulated":  # a virtual step: what BatchMemoryManager's users call in between
            self._optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        if units.row_to_unit is not None:
            raise UsageError.for_value(
                "row_to_unit", "a map", "None", f"{self.method} takes every row for an example; use a method of ours"
            )
        return super()._accumulate(loss_fn, batch, units)

    def _check_first_forward(self, losses: Tensor) -> None:
        """Refuse, once, weights that are read where Opacus cannot see it."""
        if self._first_forward is not None:
            self._first_forward.refuse_reads_past_layers(losses, self.parameters)
            self._first_forward.stop()
            self._first_forward = None

    def _check_rows(self, name: str, per_example: Tensor | None) -> None:
        """Refuse a parameter without a per-example gradient or norm, or with other rows than examples."""
        if per_example is None:
            raise UnsupportedModelError(
                f"model: {self.method} found no per-example gradient for {name}: the output does not use the "
                f"parameter, or not through its layer's forward; freeze it"
            )
        if per_example.shape[0] != self._num_examples:
            raise UnsupportedModelError(
                f"model: {self.method} got {per_example.shape[0]} rows for {name} and {self._num_examples} examples; "
                f"make the first dimension of its layer's input the examples'"
            )

    def _sum_virtually(self) -> None:
        """Clip and add up without noise: Opacus's own path for a physical batch within a logical one."""
        self._optimizer.signal_skip_step(True)
        self._optimizer.pre_step()

    def _privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: torch.Generator | None
    ) -> None:
        self._optimizer.noise_multiplier = noise_multiplier
        self._optimizer.expected_batch_size = expected_batch_size
        self._optimizer.generator = generator or self._own_generator()
        self._optimizer.add_noise()
        self._optimizer.scale_grad()

    def _accumulate_nothing(self) -> Tensor:
        for parameter in self.parameters.values():
            if getattr(parameter, "summed_grad", None) is None:
                parameter.summed_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
            if ("grad_sample", "per_example_gradients") in self.held:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        return next(iter(self.parameters.values())).new_zeros(0)

    def tracked_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what hangs on the parameters beside `.grad`."""
        for parameter in self.parameters.values():
            for attribute, category in self.held:
                tensor = getattr(parameter, attribute, None)
                if isinstance(tensor, Tensor):
                    yield category, tensor

    def zero_grad(self) -> None:
        """Clear `.grad`, `.grad_sample` and `.summed_grad`, by Opacus's own `zero_grad`."""
        self._optimizer._is_last_step_skipped = False
        if self._state == "failed":  # hooks of an interrupted pass left what they had captured
            for module in self.model.modules():
                module.__dict__.pop("activations", None)
                module.__dict__.pop("max_batch_len", None)
            for parameter in self.parameters.values():
                parameter.__dict__.pop("_current_grad_sample", None)
                parameter._forward_counter = 0  # type: ignore[attr-defined]
        self._optimizer.zero_grad(set_to_none=True)
        self._state = "clean"

    def _detach(self) -> None:
        self._wrapped.cleanup()
        if self._first_forward is not None:
            self._first_forward.stop()
        for module in self.model.modules():
            for name in (
                "activations",
                "max_batch_len",
                "ft_compute_sample_grad",
                "autograd_grad_sample_hooks",
            ):
                if name in module.__dict__:
                    delattr(module, name)
        for parameter in self.model.parameters():
            for name in ("summed_grad", "grad_sample", "_forward_counter", "_norm_sample"):
                if name in parameter.__dict__:
                    delattr(parameter, name)


class OpacusEngine(_OpacusBase):
    """Per-example gradients of every parameter, stored, then clipped and summed by `DPOptimizer`.

    Opacus does not hand out the norms it clips by, so `accumulate` returns `None` unless `report_norms` is set,
    which costs one more pass over the per-example gradients. Memory: N times the parameters on top of ordinary
    training.
    """

    method: ClassVar[str] = "opacus"
    held: ClassVar[tuple[tuple[str, str], ...]] = (
        ("grad_sample", "per_example_gradients"),
        ("summed_grad", "gradients"),
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        on_phase: Callable[[str], None] | None = None,
        report_norms: bool = False,
    ) -> None:
        self.report_norms = report_norms
        super().__init__(model, max_grad_norm=max_grad_norm, on_phase=on_phase)

    def _wrap(self) -> Any:
        from opacus.grad_sample import GradSampleModule

        return _scoped(GradSampleModule)(self.model)

    def _make_optimizer(self, stand_in: torch.optim.Optimizer) -> Any:
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(stand_in, noise_multiplier=0.0, max_grad_norm=self.max_grad_norm, expected_batch_size=1)

    def _finish(self, losses: Tensor) -> Tensor | None:
        self._announce("backward")
        self._num_examples = losses.shape[0]
        self._check_first_forward(losses)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        self._announce("clip")
        for name, parameter in self.parameters.items():
            self._check_rows(name, getattr(parameter, "grad_sample", None))
        norms = None
        if self.report_norms:
            norms = _norms_of(parameter.grad_sample for parameter in self.parameters.values())  # type: ignore[attr-defined]
        self._sum_virtually()
        return norms

    @classmethod
    def _sampler(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return `direct` for hand-written samplers, `functorch` for the rest."""
        from opacus.grad_sample import GradSampleModule

        if lacks_bias(module):
            return "none", LACKS_BIAS
        if type(module) in GradSampleModule.GRAD_SAMPLERS:
            return "direct", "hand-written per-example gradient"
        return "functorch", "no hand-written sampler"


def _norms_of(per_example: Iterator[Tensor]) -> Tensor:
    """Return the norms over all parameters, (N,)."""
    squares = [float32(g.detach()).reshape(len(g), -1).square().sum(1) for g in per_example]
    return torch.stack(squares).sum(0).sqrt()


class OpacusFunctorchEngine(OpacusEngine):
    """The same, with every layer's per-example gradient by vmap (`force_functorch`)."""

    method: ClassVar[str] = "opacus-functorch"

    def _wrap(self) -> Any:
        from opacus.grad_sample import GradSampleModule

        return _scoped(GradSampleModule)(self.model, force_functorch=True)

    @classmethod
    def _sampler(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return `functorch`, whatever the layer."""
        return "functorch", "vmap over examples"


class OpacusExpandedWeightsEngine(OpacusEngine):
    """The same, with PyTorch's ExpandedWeights instead of hooks."""

    method: ClassVar[str] = "opacus-ew"

    def _wrap(self) -> Any:
        from opacus.grad_sample import GradSampleModuleExpandedWeights

        self._handles = [
            module.register_forward_hook(want_contiguous_gradient)
            for module in self.model.modules()
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        ] + [
            module.register_forward_pre_hook(refuse_flat_indices(name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and module.weight.requires_grad
        ]
        return GradSampleModuleExpandedWeights(self.model, loss_reduction="mean")

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        """Do as every engine does; say in one line what ExpandedWeights cannot handle."""
        try:
            return super()._accumulate(loss_fn, batch, units)
        except RuntimeError as error:
            if "xpanded Weights" not in str(error):
                raise
            raise UnsupportedModelError(f"model: opacus-ew cannot run on it: {' '.join(str(error).split())}") from error

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        super()._detach()

    @classmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return `expanded weights` where PyTorch has a rule."""
        if isinstance(module, COUPLED):
            return "none", "it mixes the examples of a batch; use GroupNorm or LayerNorm"
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return "none", "ExpandedWeights gives the padding row a gradient; set padding_idx=None, or use ghost"
        if type(module) not in _EXPANDED_LAYERS:
            return "none", f"ExpandedWeights has no rule for {type(module).__name__}; use opacus"
        return "expanded weights", "PyTorch's own rule"


class OpacusGhostEngine(_OpacusBase):
    """Opacus's ghost clipping: `DPLossFastGradientClipping` runs both backward passes."""

    method: ClassVar[str] = "opacus-ghost"
    held: ClassVar[tuple[tuple[str, str], ...]] = (("_norm_sample", "kept_for_clipping"), ("summed_grad", "gradients"))

    def _wrap(self) -> Any:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        wrapped = _scoped(GradSampleModuleFastGradientClipping)(self.model, max_grad_norm=self.max_grad_norm)
        compute = wrapped.get_clipping_coef

        def announced() -> Tensor:
            self._announce("clip")
            for name, parameter in self.parameters.items():
                self._check_rows(name, getattr(parameter, "_norm_sample", None))
            coefficients: Tensor = compute()
            return coefficients

        wrapped.get_clipping_coef = announced
        self._refuse_ties()
        self._calls: dict[str, int] = {}
        self._handles = [
            module.register_forward_pre_hook(self._count(name))
            for name, module in self.model.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        return wrapped

    def _refuse_ties(self) -> None:
        """Refuse parameters that two modules share, which Opacus notices in the middle of the first step."""
        owners: dict[nn.Parameter, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and owners.setdefault(parameter, name) != name:
                raise UnsupportedModelError(
                    f"model: opacus-ghost cannot run on {name}: it is tied to {owners[parameter]}; use ghost"
                )

    def _count(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Return a hook that refuses the second call of a module within one forward."""

        def hook(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled():
                self._calls[name] = self._calls.get(name, 0) + 1
                if self._calls[name] > 1:
                    raise UnsupportedModelError(
                        f"model: opacus-ghost cannot run on layer {name}: it is called more than once in a forward "
                        f"pass, which Opacus takes for parameter tying; use ghost"
                    )

        return hook

    def _make_optimizer(self, stand_in: torch.optim.Optimizer) -> Any:
        from opacus.optimizers import DPOptimizerFastGradientClipping

        return DPOptimizerFastGradientClipping(
            stand_in, noise_multiplier=0.0, max_grad_norm=self.max_grad_norm, expected_batch_size=1
        )

    def _begin(self) -> None:
        super()._begin()
        self._calls.clear()
        for parameter in self.parameters.values():
            parameter.__dict__.pop("_norm_sample", None)  # a stale norm would stand in for a missing one

    def _finish(self, losses: Tensor) -> Tensor:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        self._announce("backward")
        self._num_examples = losses.shape[0]
        self._check_first_forward(losses)
        DPTensorFastGradientClipping(self._wrapped, self._optimizer, losses, "mean").backward()
        norms: Tensor = self._wrapped.per_sample_gradient_norms.detach()
        self._sum_virtually()
        return norms

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        super()._detach()

    @classmethod
    def _sampler(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return `ghost` where Opacus has a norm sampler, else `direct` or `functorch`."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

        if lacks_bias(module):
            return "none", LACKS_BIAS
        if type(module) in Ghost.NORM_SAMPLERS:
            return "ghost", "norm sampler"
        if type(module) in Ghost.GRAD_SAMPLERS:
            return "direct", "per-example gradient, then its norm"
        return "functorch", "per-example gradient by vmap, then its norm"
