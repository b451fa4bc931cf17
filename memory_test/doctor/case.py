"""A model with a batch and a loss: what is examined, and how parts and changed versions of it are made.

Shapes: R rows, U units (the examples, unless a map says which rows belong together).
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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
from dit_dp.clipping.reference import clipped_sum
from dit_dp.clipping.units import ROW_TO_UNIT, Units


@dataclass(frozen=True)
class Case:
    """A model, R rows for it, and the loss of each of their U units.

    Attributes:
        model: Never changed by what examines it.
        batch: Tensors (R, ...).
        loss_fn: ``loss_fn(model, batch)`` returns (U,) losses; draws nothing at random.
        row_to_unit: (R,) the unit of each row; `None`: each row is one.
    """

    model: nn.Module
    batch: Batch
    loss_fn: LossFn
    row_to_unit: Tensor | None = None

    @property
    def num_units(self) -> int:
        """Return U."""
        return Units.of(num_rows(self.batch), self.row_to_unit).num_units

    @property
    def unit_of_row(self) -> Tensor:
        """Return the unit of each row, (R,)."""
        return torch.arange(num_rows(self.batch)) if self.row_to_unit is None else self.row_to_unit

    def take(self, units: Sequence[int]) -> "Case":
        """Return the case of these units alone, in this order."""
        if list(units) == list(range(self.num_units)):
            return self
        parts = [(self.unit_of_row == unit).nonzero()[:, 0] for unit in units]
        chosen = torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
        ids = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]).long())
        batch = map_tensors(lambda tensor: tensor[chosen.to(tensor.device)], self.batch)
        if isinstance(batch, Mapping) and ROW_TO_UNIT in batch:
            batch = {**batch, ROW_TO_UNIT: ids}
        return replace(self, batch=batch, row_to_unit=None if self.row_to_unit is None else ids)

    def change(self, unit: int, value: Callable[[Tensor], Tensor]) -> "Case":
        """Return a case in which `value` of each tensor, (...), stands in every row of one unit."""
        rows = (self.unit_of_row == unit).nonzero()[:, 0]

        def changed(tensor: Tensor) -> Tensor:
            return tensor.index_put((rows.to(tensor.device),), value(tensor))

        batch = map_tensors(changed, self.batch)
        if isinstance(batch, Mapping) and isinstance(self.batch, Mapping) and ROW_TO_UNIT in batch:
            batch = {**batch, ROW_TO_UNIT: self.batch[ROW_TO_UNIT]}
        return replace(self, batch=batch)

    def in_float64(self) -> "Case":
        """Return the case with a float64 copy of the model and the batch."""
        batch = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, self.batch)
        return replace(self, model=copy.deepcopy(self.model).double(), batch=batch)


@dataclass(frozen=True)
class Reference:
    """The float64 oracle's answer.

    Attributes:
        total: Clipped sum, all trainable parameters in one vector, float64.
        norms: (U,) norms before clipping, float64.
        max_grad_norm: C.
        rounding: Relative error of a plain loop over units in the model's own precision: what no method in that
            precision can be blamed for. A norm over features that nearly cancel amplifies it.
    """

    total: Tensor
    norms: Tensor
    max_grad_norm: float
    rounding: float

    @property
    def num_clipped(self) -> int:
        """Units whose gradient is longer than C."""
        return int((self.norms > self.max_grad_norm).sum())


def refer(case: Case, max_grad_norm: float | None = None, groups: list[list[str]] | None = None) -> Reference:
    """Ask the oracle.

    Args:
        case: What to differentiate.
        max_grad_norm: C; default: the median norm, so that about half of the units are clipped.
        groups: Names of parameters that are clipped together; default: flat clipping.
    """
    threshold = max_grad_norm or _median_norm(case)
    exact, norms = clipped_sum(case.model, case.loss_fn, case.batch, threshold, case.row_to_unit, groups)
    total = flatten(exact.values())
    return Reference(total, norms, threshold, relative_error(_plain_loop(case, threshold, groups), total))


def _median_norm(case: Case) -> float:
    """Return the median of the norms that are finite and not zero, or 1."""
    _, norms = clipped_sum(case.model, case.loss_fn, case.batch, 1.0, case.row_to_unit)
    known = norms[torch.isfinite(norms) & (norms > 0)]
    return float(known.median()) if len(known) else 1.0


def _plain_loop(case: Case, max_grad_norm: float, groups: list[list[str]] | None) -> Tensor:
    """Return the clipped sum by autograd, one unit at a time, in the model's own precision."""
    model = copy.deepcopy(case.model)
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    for unit in range(case.num_units):
        (loss,) = case.loss_fn(model, case.take([unit]).batch)
        found = dict(zip(parameters, gradients_of(loss, parameters.values()), strict=True))
        for group in groups or [list(parameters)]:
            used = {name: gradient for name in group if (gradient := found[name]) is not None}
            # In float64: torch's float32 norm of 3e7 numbers is off by 1e-4, which is no property of the model.
            norm = flatten(used.values()).double().norm() if used else loss.new_zeros(())
            factor = clip_factors(norm, max_grad_norm / len(groups or [group]) ** 0.5)
            for name, gradient in used.items():
                total[name] += torch.where(factor > 0, gradient, 0) * factor
    return flatten(total.values())


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return |got - exact| / |exact|; the error itself where the exact value is zero."""
    length = float(exact.norm())
    return float((got.double() - exact).norm()) / (length or 1.0)


def floating(batch: Batch) -> dict[str | int, Tensor]:
    """Return the floating-point tensors of a batch by their key or place."""
    named = batch.items() if isinstance(batch, Mapping) else enumerate(tensors_of(batch))
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}
