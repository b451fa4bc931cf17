"""The oracle: a slow float64 loop over examples that every private method is compared with."""

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import (
    Batch,
    LossFn,
    check_losses,
    clip_factors,
    gradients_of,
    map_tensors,
    num_rows,
    trainable_parameters,
)
from dit_dp.clipping.units import Units
from dit_dp.errors import EngineStateError


def clipped_sum(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    max_grad_norm: float,
    row_to_unit: Tensor | None = None,
    groups: Sequence[Collection[str]] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip each unit's gradient and add them up, one unit at a time, in float64.

    Args:
        model: Left untouched; a float64 copy is differentiated. No engine may be attached to it.
        loss_fn: Returns (U,) losses and draws nothing at random.
        batch: R rows. Floating-point tensors are converted to float64.
        max_grad_norm: C.
        row_to_unit: (R,) the unit of each row; default: each row is one.
        groups: Parameter names that are clipped together, each group to C / sqrt(groups); default: one group, flat
            clipping.

    Returns:
        The clipped sum by parameter name (trainable parameters only) and the (U,) norms over all of them, both float64.

    Raises:
        LossShapeError: The loss of one example is not of shape (1,).

    **Guarantees**: the definition itself, ``sum_i min(1, C / (|g_i| + 1e-6)) g_i`` with the norm over all
    trainable parameters (or over each group). **Edge cases**: a unit whose norm is not finite in float32 is
    dropped; an empty batch gives zeros.
    """
    if hasattr(model, "_dit_dp_engine"):
        raise EngineStateError("model: an engine is attached; the oracle needs the plain model, call detach() first")
    exact = copy.deepcopy(model).double()
    parameters = trainable_parameters(exact)
    rows = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    units = Units.of(num_rows(rows), row_to_unit)
    together = [set(parameters)] if groups is None else [set(group) for group in groups]
    threshold = max_grad_norm / len(together) ** 0.5
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for index in range(units.num_units):
        example, _ = units.take(rows, index, index + 1)
        losses = loss_fn(exact, example)
        check_losses(losses, 1)
        found = gradients_of(losses[0], parameters.values())
        gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
        squares = [_squared_norm([g for name, g in gradients.items() if name in group], losses) for group in together]
        norms.append(torch.stack(squares).sum().sqrt())
        for group, square in zip(together, squares, strict=True):
            if not torch.isfinite(square.float()):
                continue
            factor = clip_factors(square.sqrt(), threshold)
            for name in group & gradients.keys():
                total[name] += factor * gradients[name]
    device = next(iter(parameters.values())).device
    return total, torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=device)


def _squared_norm(gradients: list[Tensor], losses: Tensor) -> Tensor:
    """Return the sum of squares, () float64, detached."""
    return sum((g.square().sum() for g in gradients), start=losses.detach().new_zeros(()))
