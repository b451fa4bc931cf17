"""The interface of every clipping method, and what they share: state, empty batches, noise."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.clipping.batch import Batch, LossFn, check_losses, num_rows, trainable_parameters
from dit_dp.clipping.contributions import HALF
from dit_dp.clipping.noise import entropy_size, generator_of
from dit_dp.clipping.ranks import Ranks, local
from dit_dp.clipping.unchanged import HeldGradients, require_attached
from dit_dp.clipping.units import Units
from dit_dp.errors import EngineStateError, UsageError

LayerRule = Literal[
    "ghost",
    "direct",
    "tiled",
    "outer product",
    "keep",
    "embedding",
    "broadcast",
    "functorch",
    "expanded weights",
    "none",
]
"""How a layer's per-example norm is obtained; `none`: the method cannot run on it."""


def _ignore_phase(phase: str) -> None:
    """Announce to nobody."""


class Engine(ABC):
    """A method attached to a model.

    One step: `accumulate` (or a forward and `backward`), once or more; `privatize`, once; the optimizer's
    step; `zero_grad`. Between `accumulate` and `privatize` the sum belongs to the engine: ours keep it in
    `.grad`, where nobody else may write meanwhile, a peer where it likes. After `privatize` it is in `.grad`,
    noised and divided by the expected batch size.

    Attributes:
        parameters: What the optimizer takes, by name: the model's own, or a float32 master for each that is of half
            precision. Sums and noise are in the masters' `.grad`; `zero_grad` writes the masters back into the model,
            or the next `accumulate` where the optimizer's own `zero_grad` was called instead.
        num_dropped: Units since the last step whose norm was not finite: dropped, their contribution is zero.
    """

    private: ClassVar[bool] = True
    sums_in_grad: ClassVar[bool] = True
    """Whether the sum is in `.grad` between `accumulate` and `privatize`."""

    def __init__(
        self, model: nn.Module, *, max_grad_norm: float, on_phase: Callable[[str], None] | None = None
    ) -> None:
        validate.real("max_grad_norm", max_grad_norm, positive=True)
        if hasattr(model, "_dit_dp_engine"):
            raise EngineStateError("model: another engine is attached; call its detach() first")
        self.model = model
        self.max_grad_norm = float(max_grad_norm)
        self.model_parameters = trainable_parameters(model)
        self.parameters = {name: _master(p) for name, p in self.model_parameters.items()}
        self._units = Units(0, 0)
        self._spent: object = None
        self.num_dropped = 0
        self._announce = on_phase or _ignore_phase
        self._state: Literal["clean", "accumulated", "privatized", "failed"] = "clean"
        self._sum_left: HeldGradients | None = None
        self._generator: torch.Generator | None = None
        self.ranks = Ranks()
        self._attach()
        self._modules = dict(model.named_modules())
        model._dit_dp_engine = True  # type: ignore[assignment]

    # --- the step -------------------------------------------------------------------------------------------

    def accumulate(
        self, loss_fn: LossFn, batch: Batch, row_to_unit: Tensor | Sequence[int] | None = None
    ) -> Tensor | None:
        """Run forward and backward; add the sum of clipped per-unit gradients to what is accumulated.

        Args:
            loss_fn: Returns (U,) losses; draws nothing at random, so that every pass sees the same function.
            batch: R rows; no row is an empty Poisson batch and adds nothing.
            row_to_unit: (R,) integers, the privacy unit of each row; default: each row is one (U = R = N). In a dict
                batch an entry of this name is renumbered where a method takes some of the units at a time.

        Returns:
            (U,) norms of the per-unit gradients before clipping, detached; `None` where the method has none.

        Raises:
            LossShapeError: The losses are not of shape (U,).
            EngineStateError: The last step's gradients were not cleared, or some came from outside; the model is not
                as it was attached.
            UsageError: `batch` is no tuple or dict of tensors, or `row_to_unit` not a map of the rows onto 0 ... U - 1.
        """
        self._begin()
        units = Units.of(num_rows(batch), row_to_unit)
        self._announce("forward")
        with self._failing():
            if units.num_units == 0 and not self.ranks.in_step:
                return self._accumulate_nothing()
            return self._accumulate(loss_fn, batch, units)

    def backward(self, losses: Tensor) -> Tensor | None:
        """Do the same for a forward pass that the caller ran, where every row is a unit.

        Args:
            losses: (N,) per-example losses with their graph, from the model that `forward_model` returns.

        Returns:
            As `accumulate`.

        Raises:
            EngineStateError: As `accumulate`; or the model that was run has yet to take what the optimizer did to its
                float32 masters.
        """
        if self._state == "privatized" and any(p is not q for p, q in self._masters()):
            raise EngineStateError(
                "backward: the forward ran before the float32 masters were written back into the model; call the "
                "engine's zero_grad after the optimizer's step, then run the forward"
            )
        self._begin()
        check_losses(losses)
        if losses.shape[0] == 0:
            if self.ranks.in_step:
                raise UsageError(
                    "losses: got none, while other ranks wait in their backward for this one's part; have every rank "
                    "call accumulate, where one without units takes part with a stand-in"
                )
            with self._failing():
                return self._accumulate_nothing()
        if losses.grad_fn is self._spent:
            raise EngineStateError("backward: these losses were back-propagated already; run the forward again")
        self._spent = losses.grad_fn
        with self._failing():
            self._units = Units(losses.shape[0], losses.shape[0])
            self._examine(losses)
            return self._finish(losses)

    @property
    def forward_model(self) -> nn.Module:
        """The module to call before `backward`: the model itself, or a peer's wrapper around it."""
        return self._callable_model()

    @torch.no_grad()
    def privatize(
        self, *, noise_multiplier: float, expected_batch_size: float, generator: torch.Generator | None = None
    ) -> None:
        """Add Gaussian noise of standard deviation ``noise_multiplier * C`` once, divide by the batch size.

        Args:
            noise_multiplier: sigma; 0 adds none, which gives no privacy.
            expected_batch_size: The divisor: the expected batch of all ranks together, never the one that was drawn.
            generator: Source of the noise on the parameters' device, in the same state on every rank; default: the
                engine's own, seeded by the operating system.

        Raises:
            EngineStateError: Nothing was accumulated since the last call, or somebody else changed the sum.
            UsageError: An argument is not the same on every rank.

        **Guarantees**: the clipped sum has sensitivity C under adding or removing one example, so the noise is
        that of the Gaussian mechanism with multiplier sigma. **Edge cases**: after an empty batch the result
        is noise alone; a parameter without gradient takes noise too.
        """
        validate.real("noise_multiplier", noise_multiplier, positive=False)
        validate.real("expected_batch_size", expected_batch_size, positive=True)
        if self._state == "failed":
            raise EngineStateError("privatize: an accumulate call failed half way, so the sum is lost; call zero_grad")
        if self._state != "accumulated":
            raise EngineStateError("privatize: nothing was accumulated since the last call; call accumulate first")
        if self._sum_left is not None:
            self._sum_left.require_same("privatize")
        self._sum_left = None
        if self.private:
            self._announce("noise")
        try:
            self._privatize(noise_multiplier, expected_batch_size, generator)
        except UsageError:  # an argument was refused, the sum is as it was
            self._hold()
            raise
        self._state = "privatized"

    def zero_grad(self) -> None:
        """Clear gradients and whatever else the step left behind; write float32 masters back into the model."""
        for parameter in self.parameters.values():
            parameter.grad = None
        with torch.no_grad():
            for parameter, master in self._masters():
                if parameter is not master:
                    parameter.copy_(master)
        self._spent = self._sum_left = None
        self.num_dropped = 0
        self._state = "clean"

    def detach(self) -> None:
        """Put the model back as it was before `attach`."""
        self.zero_grad()
        self._detach()
        self.ranks.leave()
        del self.model._dit_dp_engine

    def join(self, ranks: Ranks) -> None:
        """Train with other ranks; each has to call this. Called by `attach`."""
        self.ranks = ranks
        ranks.enter()
        if not ranks.alone:  # all at once, whoever will use it
            self._own_generator()

    # --- what meters and people ask -------------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """Whether a step has begun that no `zero_grad` has ended."""
        return self._state != "clean"

    def tracked_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (category, tensor) for what the engine holds now beyond `.grad`; categories as in records."""
        yield from ()

    @property
    def groups(self) -> list[list[str]] | None:
        """Names of parameters that are clipped together; `None`: all of them, flat clipping."""
        return None

    def choices(self) -> dict[str, Any]:
        """Return what the engine decided by itself, for the record."""
        return {}

    @classmethod
    @abstractmethod
    def layer_rule(cls, module: nn.Module) -> tuple[LayerRule, str]:
        """Return how this method treats one module with parameters of its own, and why or what to do."""

    # --- for methods to fill in -----------------------------------------------------------------------------

    @abstractmethod
    def _attach(self) -> None:
        """Prepare the model, or raise `UnsupportedModelError` naming the layer."""

    @abstractmethod
    def _finish(self, losses: Tensor) -> Tensor | None:
        """Go from (N,) losses, N > 0, to the accumulated sum; announce ``backward`` and ``clip``."""

    @abstractmethod
    def _detach(self) -> None:
        """Undo `_attach`."""

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        """Run the forward on all rows, then `_finish`."""
        self._units = units
        losses = loss_fn(self._callable_model(), batch)
        check_losses(losses, units.num_units)
        return self._finish(losses)

    def _examine(self, losses: Tensor) -> None:
        """Look at the graph of (N,) losses that `backward` was given, before `_finish`."""
        return

    def _callable_model(self) -> nn.Module:
        """Return what `loss_fn` is given."""
        return self.model

    def _accumulate_nothing(self) -> Tensor | None:
        """Accumulate an empty batch."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        first = next(iter(self.parameters.values()))
        return torch.zeros(0, dtype=first.dtype, device=first.device)

    def _privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: torch.Generator | None
    ) -> None:
        """Noise and normalise `.grad`, one parameter at a time: noise of the mean, so that one pass does both."""
        std = noise_multiplier * self.max_grad_norm
        source = generator or self._own_generator()
        self.ranks.require_same(source, noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size)
        for parameter in self.ranks.summed(self.parameters.values()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if std > 0:
                noise = local(self.ranks.noise(parameter, std / expected_batch_size, source))
                total = local(parameter.grad)
                torch.add(noise, total, alpha=1 / expected_batch_size, out=total)
            elif expected_batch_size != 1:
                parameter.grad.div_(expected_batch_size)

    # --- private --------------------------------------------------------------------------------------------

    def _own_generator(self) -> torch.Generator:
        """Return the engine's noise source, made on first use with entropy of the operating system."""
        if self._generator is None:
            device = next(iter(self.parameters.values())).device
            self._generator = generator_of(self.ranks.entropy(entropy_size(device)), device)
        return self._generator

    def _masters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield each of the model's parameters with what the optimizer takes for it."""
        return zip(self.model_parameters.values(), self.parameters.values(), strict=True)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Make a sum that an exception interrupted unusable: part of a batch may be in it."""
        self._state, self._sum_left = "failed", None
        yield
        self._state = "accumulated"
        self._hold()

    def _hold(self) -> None:
        """Remember where the sum is, so that nobody changes it unnoticed."""
        if self.sums_in_grad:
            self._sum_left = HeldGradients((*self.parameters.items(), *self.model_parameters.items()))

    def _begin(self) -> None:
        """Check that the model is the one attached and gradients are where the engine left them."""
        require_attached(self.model, self._modules, self.model_parameters, self.ranks.same)
        if self._state == "failed":
            raise EngineStateError("accumulate: an earlier call failed half way, so the sum is lost; call zero_grad")
        if self._state == "accumulated":
            if self._sum_left is not None:
                self._sum_left.require_same("accumulate")
            return
        for name, parameter in (*self.parameters.items(), *self.model_parameters.items()):
            if parameter.grad is not None:
                reason = (
                    "the last step was not cleared"
                    if self._state == "privatized"
                    else "it came from outside the engine"
                )
                raise EngineStateError(f"accumulate: parameter {name} already has a gradient: {reason}; call zero_grad")
        if self._state == "privatized":  # cleared by the optimizer's own zero_grad, which does not do the rest of ours
            self.zero_grad()
        self._state = "clean"


def require_no_noise(noise_multiplier: float) -> None:
    """Raise unless the noise multiplier is 0; for methods without clipping."""
    if noise_multiplier != 0:
        raise UsageError.for_value(
            "noise_multiplier",
            noise_multiplier,
            "0",
            "without clipping, noise has no scale and protects nobody",
        )


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter, or a float32 copy of one of half precision."""
    return nn.Parameter(parameter.detach().float()) if parameter.dtype in HALF else parameter
