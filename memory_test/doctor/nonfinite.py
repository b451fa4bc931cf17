"""Examples that are not finite: dropped and counted, while the others' sum stays as it was."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch
from dit_dp.clipping.registry import METHODS
from dit_dp.clipping.units import ROW_TO_UNIT
from memory_test.doctor.case import Case, floating
from memory_test.doctor.checks import SLACK
from memory_test.doctor.facts import Check
from memory_test.doctor.trial import Clipped, Trial

POISONS = (math.nan, math.inf, 1e30)
"""1e30 is finite in float32; its square is not."""

_WEIGHTS = "_doctor_gradient_weights"


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a weight per example."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return gradients[0] * weights, None


def nonfinite(trial: Trial) -> Check:
    """One example is made NaN, infinite or huge: in each input and target by turns, then in its gradient.

    It is dropped (its norm is not finite, the engine counts it, the sum is that of the others), or, where the model
    makes it finite again, it adds at most C; everything stays finite either way.
    """
    unit = trial.some_units(1)[0]
    worst, dropped, count, where = 0.0, 0, 0, ""
    for name, poisoned in _poisoned(trial.case, unit):
        deviation, is_dropped = _deviation(trial, unit, trial.run(poisoned))
        count, dropped = count + 1, dropped + is_dropped
        if deviation > worst:
            worst, where = deviation, name
    text = f"move of the others' sum, over C; {dropped} of {count} poisoned examples dropped"
    return Check.of("non-finite", worst, SLACK, f"{text}; worst: {where}" if worst > SLACK else text)


def _deviation(trial: Trial, unit: int, got: Clipped) -> tuple[float, bool]:
    """Return by how much a poisoned case's sum differs from what it may be, and whether the example was dropped.

    A method that clips by groups drops the groups that are not finite; what is left of the example is at most C.
    """
    moved = trial.relative(got.total - trial.without(unit).total)
    kept = max(0.0, moved - 1) if moved > SLACK else moved
    if got.norms is None:
        return kept, moved <= SLACK
    finite = torch.isfinite(got.norms)
    others = [other for other in range(trial.num_units) if other != unit]
    counts = METHODS[trial.method].peer or (got.num_dropped > 0) == (not bool(finite[unit]))
    if not bool(finite[others].all()) or not counts:
        return math.inf, False
    whole = not bool(finite[unit]) and METHODS[trial.method].flat
    return (moved if whole else kept), not bool(finite[unit]) and math.isfinite(moved)


def _poisoned(case: Case, unit: int) -> Iterator[tuple[str, Case]]:
    """Yield what is poisoned and how, and the case."""
    rows = case.unit_of_row == unit
    for poison in POISONS:
        for key in floating(case.batch):
            yield f"{poison:g} in batch[{key!r}]", _replace_one(case, key, int(rows.nonzero()[0, 0]), poison)
        weights = torch.where(rows, poison, 1.0)
        yield f"{poison:g} in the gradient", _with_weights(case, weights)


def _replace_one(case: Case, key: str | int, row: int, value: float) -> Case:
    """Return a case with one row of one tensor filled with a value."""

    def filled(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        result[row] = value
        return result

    batch: Batch
    if isinstance(case.batch, Mapping):
        batch = {name: filled(tensor) if name == key else tensor for name, tensor in case.batch.items()}
    else:
        batch = tuple(filled(tensor) if place == key else tensor for place, tensor in enumerate(case.batch))
    return replace(case, batch=batch)


def _with_weights(case: Case, weights: Tensor) -> Case:
    """Return a case whose batch carries a weight per row, equal in a unit, and whose loss scales its gradient by it."""

    def weighted(model: nn.Module, carrying: Batch) -> Tensor:
        if isinstance(carrying, Mapping):
            inner: Batch = {name: tensor for name, tensor in carrying.items() if name != _WEIGHTS}
            own, units = carrying[_WEIGHTS], carrying.get(ROW_TO_UNIT)
        else:
            inner, own, units = carrying[:-1], carrying[-1], None
        losses = case.loss_fn(model, inner)
        own = own.to(losses)
        if units is not None:
            own = torch.ones_like(losses).index_copy(0, units.to(losses.device), own)
        scaled: Tensor = _ScaledGradient.apply(losses, own)  # type: ignore[no-untyped-call]
        return scaled

    carrying = {**case.batch, _WEIGHTS: weights} if isinstance(case.batch, Mapping) else (*case.batch, weights)
    return replace(case, batch=carrying, loss_fn=weighted)
