"""The oracle: a slow float64 loop over examples that every private method is compared with."""

import copy

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import (
    Batch,
    LossFn,
    check_losses,
    clip_factors,
    map_tensors,
    num_rows,
    trainable_parameters,
)
from dit_dp.errors import EngineStateError


def clipped_sum(
    model: nn.Module, loss_fn: LossFn, batch: Batch, max_grad_norm: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip each example's gradient and add them up, one example at a time, in float64.

    Args:
        model: Left untouched; a float64 copy is differentiated. No engine may be attached to it.
        loss_fn: Returns (N,) losses and draws nothing at random.
        batch: Rows are examples. Floating-point tensors are converted to float64.
        max_grad_norm: C.

    Returns:
        The clipped sum by parameter name (trainable parameters only) and the (N,) norms, both float64.

    Raises:
        LossShapeError: The loss of one example is not of shape (1,).

    **Guarantees**: the definition itself, ``sum_i min(1, C / (|g_i| + 1e-6)) g_i`` with the norm over all
    trainable parameters. **Edge cases**: an example whose norm is not finite in float32 is dropped; an empty
    batch gives zeros.
    """
    if hasattr(model, "_dit_dp_engine"):
        raise EngineStateError("model: an engine is attached; the oracle needs the plain model, call detach() first")
    exact = copy.deepcopy(model).double()
    parameters = trainable_parameters(exact)
    rows = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for index in range(num_rows(rows)):
        example = map_tensors(lambda t, i=index: t[i : i + 1], rows)  # type: ignore[misc]
        losses = loss_fn(exact, example)
        check_losses(losses, 1)
        gradients = torch.autograd.grad(losses[0], list(parameters.values()), allow_unused=True)
        squares = [g.square().sum() for g in gradients if g is not None]
        norm = torch.stack(squares).sum().sqrt() if squares else losses.new_zeros(())
        norms.append(norm.detach())
        representable = torch.isfinite(norm.square().float())
        factor = clip_factors(norm, max_grad_norm)
        if not representable:
            continue
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += factor * gradient
    device = next(iter(parameters.values())).device
    return total, torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=device)
