"""What a model and a loss must be before any method can be right; found on the plain model, without a method.

The loss draws nothing at random, and no example depends on another: else there is no per-example gradient.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import map_tensors
from memory_test.doctor.case import Case, floating
from memory_test.doctor.checks import with_anothers_values
from memory_test.doctor.facts import Check

PROBED = 3
"""Examples whose reach is looked at."""

FORWARD_SLACK = 1e-4
"""Relative change of another example's loss that rounding explains: kernels may sum in another order."""


def determinism(case: Case) -> Check:
    """Two forward passes give the same losses: second passes, recomputation and the oracle see one function."""
    with torch.no_grad():
        first, second = (case.loss_fn(case.model, case.batch) for _ in range(2))
    moved = float((first - second).abs().nan_to_num(nan=float("inf")).max())
    fix = "; draw randomness (dropout, times, noise) beforehand and make it part of the batch"
    return Check.of("determinism", moved, 0, f"change of a loss when run twice{fix * (moved > 0)}")


@dataclass(frozen=True)
class Leak:
    """How far one example reaches into the rows of another.

    Attributes:
        size: Largest absolute gradient found where it must be exactly zero.
        where: The layer or input, and the examples; empty if there is none.
    """

    size: float = 0.0
    where: str = ""


def gradient_coupling(case: Case, unit: int) -> Leak:
    """Back-propagate one example's loss; look at the other examples' rows everywhere.

    Args:
        case: Left untouched.
        unit: The example whose loss is differentiated.

    Returns:
        The largest gradient that reaches another row of a layer's output or of a floating-point input.
    """
    foreign = {len(ids): ids != unit for ids in (torch.arange(case.num_units), case.unit_of_row)}
    leaks = [Leak()]
    model = copy.deepcopy(case.model)
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.register_forward_hook(_watch(name or "(root)", foreign, leaks))
    batch = map_tensors(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), case.batch)
    losses = case.loss_fn(model, batch)
    losses[unit].backward()  # type: ignore[no-untyped-call]
    for key, tensor in floating(batch).items():
        if tensor.grad is not None:
            leaks.append(_leak_of(f"batch[{key!r}]", tensor.grad, foreign[len(tensor)]))
    worst = max(leaks, key=lambda leak: leak.size)
    return Leak(worst.size, f"{worst.where} by the loss of example {unit}" if worst.size > 0 else "")


def _watch(name: str, foreign: Mapping[int, Tensor], leaks: list[Leak]) -> Callable[..., None]:
    """Return a forward hook that looks at the gradient of a layer's output, also when it is recomputed."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad or not output.dim():
            return
        others = foreign.get(output.shape[0])
        if others is not None:  # else rows of other things than examples: inputs and losses have to tell
            output.register_hook(lambda g: leaks.append(_leak_of(f"layer {name}", g, others)))  # type: ignore[no-untyped-call]

    return hook


def _leak_of(where: str, gradient: Tensor, others: Tensor) -> Leak:
    """Return the largest entry of the other examples' rows; NaN is a row's own infinite derivative times zero."""
    foreign = gradient.detach()[others.to(gradient.device)].abs()
    size = float(foreign.nan_to_num(nan=0.0).max()) if foreign.numel() else 0.0
    return Leak(size, where) if size > 0 else Leak()


def forward_coupling(case: Case, unit: int) -> Leak:
    """Change one example; return by how much another one's loss moves, relative to it."""
    with torch.no_grad():
        before = case.loss_fn(case.model, case.batch)
        after = case.loss_fn(case.model, with_anothers_values(case, unit, 3.0).batch)
    moved = ((after - before).abs() / before.abs().clamp(min=1e-30)).nan_to_num(nan=float("inf"))
    moved[unit] = 0
    size = float(moved.max())
    where = f"the loss of example {int(moved.argmax())}, when {unit} changes"
    return Leak(size, where) if size > FORWARD_SLACK else Leak()


def coupling(case: Case) -> Check:
    """No example's loss depends on another example: not through any layer, input, statistic or constant."""
    text = "gradient of an example's loss at another's rows"
    probed = range(min(case.num_units, PROBED))
    leaks = [probe(case, unit) for unit in probed for probe in (gradient_coupling, forward_coupling)]
    worst = max(leaks, key=lambda leak: leak.size)
    return Check.of("coupling", worst.size, 0, f"{text}; {worst.where}" if worst.size > 0 else text)
