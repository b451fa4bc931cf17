"""A model with a batch and a loss, and one private method run on it."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.batch import (
    Batch,
    LossFn,
    clip_factors,
    gradients_of,
    map_tensors,
    num_rows,
    tensors_of,
    trainable_parameters,
)
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.reference import clipped_sum


@dataclass(frozen=True)
class Case:
    """A model, N examples for it, and their loss."""

    model: nn.Module
    batch: Batch
    loss_fn: Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Reference:
    """The float64 oracle's answer.

    Attributes:
        total: Clipped sum, all trainable parameters in one vector, float64.
        norms: (N,) norms before clipping, float64.
        max_grad_norm: C.
        rounding: Relative error of a plain loop over examples in the model's own precision: what no method in
            that precision can be blamed for. A norm over features that nearly cancel amplifies it.
    """

    total: Tensor
    norms: Tensor
    max_grad_norm: float
    rounding: float

    @property
    def num_clipped(self) -> int:
        """Examples whose gradient is longer than C."""
        return int((self.norms > self.max_grad_norm).sum())


def refer(case: Case, max_grad_norm: float | None = None) -> Reference:
    """Ask the oracle.

    Args:
        case: What to differentiate.
        max_grad_norm: C; default: the median norm, so that about half of the examples are clipped.
    """
    _, norms = clipped_sum(case.model, case.loss_fn, case.batch, 1.0)
    known = norms[torch.isfinite(norms) & (norms > 0)]
    threshold = max_grad_norm or (float(known.median()) if len(known) else 1.0)
    exact, norms = clipped_sum(case.model, case.loss_fn, case.batch, threshold)
    total = flatten(exact.values())
    return Reference(total, norms, threshold, relative_error(_plain_loop(case, threshold), total))


def _plain_loop(case: Case, max_grad_norm: float) -> Tensor:
    """Return the clipped sum by autograd, one example at a time, in the model's own precision."""
    model = copy.deepcopy(case.model)
    parameters = list(trainable_parameters(model).values())
    total = torch.zeros_like(flatten(parameters)).detach()
    for row in range(num_rows(case.batch)):
        (loss,) = case.loss_fn(model, rows(case.batch, [row]))
        found = zip(parameters, gradients_of(loss, parameters), strict=True)
        gradient = flatten(torch.zeros_like(p) if g is None else g for p, g in found)
        factor = clip_factors(gradient.norm(), max_grad_norm)
        total += torch.where(factor > 0, gradient, 0) * factor
    return total


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return |got - exact| / |exact|; the error itself where the exact value is zero."""
    length = float(exact.norm())
    return float((got.double() - exact).norm()) / (length or 1.0)


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def rows(batch: Batch, index: Sequence[int]) -> Batch:
    """Return these rows of a batch, in this order."""
    return map_tensors(lambda tensor: tensor[list(index)], batch)


def to_float64(batch: Batch) -> Batch:
    """Return a batch whose floating-point tensors are float64."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def replace_rows(batch: Batch, row: int, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a copy of a batch in which `change` of each tensor stands in one row."""

    def changed(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        result[row] = change(tensor)
        return result

    return map_tensors(changed, batch)


def floating(batch: Batch) -> dict[str | int, Tensor]:
    """Return the floating-point tensors of a batch by their key or place."""
    named = batch.items() if isinstance(batch, Mapping) else enumerate(tensors_of(batch))
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


@dataclass(frozen=True)
class Clipped:
    """What a method returned.

    Attributes:
        total: `.grad` of all trainable parameters in one vector.
        norms: (N,) norms before clipping, or `None` where the method does not hand them out.
    """

    total: Tensor
    norms: Tensor | None


class Trial:
    """One method on one case at one threshold; every run has a fresh copy of the model.

    Attributes:
        case: What is examined.
        method: A key of `METHODS`.
        reference: The oracle's answer for `case`; gives the threshold.
        seed: Of `generator`.
        generator: Source of whatever a check draws.
    """

    def __init__(self, case: Case, method: str, reference: Reference, seed: int = 0) -> None:
        self.case, self.method, self.reference, self.seed = case, method, reference, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.num_examples = num_rows(case.batch)
        self.max_grad_norm = reference.max_grad_norm
        self._subsets: dict[tuple[int, ...], Clipped] = {}

    def attach(self) -> Engine:
        """Attach the method to a copy of the model."""
        return attach(copy.deepcopy(self.case.model), self.method, max_grad_norm=self.max_grad_norm)

    def in_float64(self) -> "Trial":
        """Return the same trial on a float64 copy of the model and the batch."""
        exact = Case(copy.deepcopy(self.case.model).double(), to_float64(self.case.batch), self.case.loss_fn)
        return Trial(exact, self.method, self.reference, self.seed)

    def run(self, *batches: Batch, loss_fn: LossFn | None = None) -> Clipped:
        """Return the clipped sum over one batch, or over several that one release is made of."""
        engine = self.attach()
        norms = [engine.accumulate(loss_fn or self.case.loss_fn, batch) for batch in batches]
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        known = [norm.detach() for norm in norms if norm is not None]
        return Clipped(released(engine), torch.cat(known) if len(known) == len(norms) else None)

    def subset(self, index: Sequence[int]) -> Clipped:
        """Return the clipped sum over these rows of the case's batch; remembered."""
        key = tuple(index)
        if key not in self._subsets:
            self._subsets[key] = self.run(rows(self.case.batch, key))
        return self._subsets[key]

    def everyone(self) -> Clipped:
        """Return the clipped sum over all rows."""
        return self.subset(range(self.num_examples))

    def without(self, row: int) -> Clipped:
        """Return the clipped sum over all rows but one."""
        return self.subset([other for other in range(self.num_examples) if other != row])

    def some_rows(self, most: int = 4) -> list[int]:
        """Return rows to remove or to change: all of them, or `most` drawn at random."""
        drawn = torch.randperm(self.num_examples, generator=self.generator).tolist()
        return sorted(drawn[:most])

    def relative(self, difference: Tensor) -> float:
        """Return the length of a vector in units of C; infinity if it is not finite."""
        length = float(difference.double().norm()) / self.max_grad_norm
        return length if length == length else float("inf")


def released(engine: Engine) -> Tensor:
    """Return `.grad` of an engine's parameters as one vector, zeros where there is none."""
    parameters = engine.parameters.values()
    return flatten(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters).detach()
