"""Examples that are not finite: dropped and counted, while the others' sum stays as it was."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn
from memory_test.doctor.case import Clipped, Trial, floating
from memory_test.doctor.checks import SLACK
from memory_test.doctor.facts import Check

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

    It is dropped (its norm is not finite, the sum is that of the others), or, where the model makes it finite
    again, it adds at most C; everything stays finite either way.
    """
    row = trial.some_rows(1)[0]
    worst, dropped, count, where = 0.0, 0, 0, ""
    for name, batch, loss_fn in _poisoned(trial, row):
        got = trial.run(batch, loss_fn=loss_fn)
        deviation, is_dropped = _deviation(trial, row, got)
        count, dropped = count + 1, dropped + is_dropped
        if deviation > worst:
            worst, where = deviation, name
    text = f"move of the others' sum, over C; {dropped} of {count} poisoned examples dropped"
    return Check.of("non-finite", worst, SLACK, f"{text}; worst: {where}" if worst > SLACK else text)


def _deviation(trial: Trial, row: int, got: Clipped) -> tuple[float, bool]:
    """Return by how much a poisoned batch's sum differs from what it may be, and whether the example was dropped."""
    moved = trial.relative(got.total - trial.without(row).total)
    if got.norms is None:
        return max(0.0, moved - 1) if moved > SLACK else moved, moved <= SLACK
    finite = torch.isfinite(got.norms)
    others = [other for other in range(trial.num_examples) if other != row]
    if not bool(finite[others].all()):
        return math.inf, False
    return (max(0.0, moved - 1), False) if bool(finite[row]) else (moved, True)


def _poisoned(trial: Trial, row: int) -> Iterator[tuple[str, Batch, LossFn]]:
    """Yield what is poisoned and how, the batch and its loss."""
    case = trial.case
    for poison in POISONS:
        for key in floating(case.batch):
            name = f"{poison:g} in batch[{key!r}]"
            yield name, _replace_one(case.batch, key, row, poison), case.loss_fn
        weights = torch.ones(trial.num_examples)
        weights[row] = poison
        yield f"{poison:g} in the gradient", *_with_weights(case.batch, weights, case.loss_fn)


def _replace_one(batch: Batch, key: str | int, row: int, value: float) -> Batch:
    """Return a batch with one row of one tensor filled with a value."""

    def filled(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        result[row] = value
        return result

    if isinstance(batch, Mapping):
        return {name: filled(tensor) if name == key else tensor for name, tensor in batch.items()}
    return tuple(filled(tensor) if place == key else tensor for place, tensor in enumerate(batch))


def _with_weights(batch: Batch, weights: Tensor, loss_fn: LossFn) -> tuple[Batch, LossFn]:
    """Return a batch that carries weights, and a loss whose gradient they scale; its value is as before."""

    def weighted(model: nn.Module, carrying: Batch) -> Tensor:
        if isinstance(carrying, Mapping):
            inner: Batch = {name: tensor for name, tensor in carrying.items() if name != _WEIGHTS}
            own = carrying[_WEIGHTS]
        else:
            inner, own = carrying[:-1], carrying[-1]
        losses = loss_fn(model, inner)
        scaled: Tensor = _ScaledGradient.apply(losses, own.to(losses))  # type: ignore[no-untyped-call]
        return scaled

    if isinstance(batch, Mapping):
        return {**batch, _WEIGHTS: weights}, weighted
    return (*batch, weights), weighted
