"""A batch is a tuple or a dict of tensors whose first dimension is rows (examples)."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dit_dp.errors import LossShapeError, UsageError

Batch: TypeAlias = tuple[Tensor, ...] | Mapping[str, Tensor]
LossFn: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""``loss_fn(model, batch)`` returns the per-example losses, shape (N,)."""


def tensors_of(batch: Batch) -> Iterable[Tensor]:
    """Return the tensors of a batch."""
    return batch.values() if isinstance(batch, Mapping) else batch


def num_rows(batch: Batch) -> int:
    """Return the number of rows.

    Raises:
        UsageError: The batch is no tuple or dict of tensors, or these disagree about their first dimension.
    """
    _check_members(batch)
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors_of(batch)}
    if len(sizes) != 1 or None in sizes:
        raise UsageError.for_value("batch", sorted(map(str, sizes)), "tensors with one common first dimension")
    size: int = sizes.pop()  # type: ignore[assignment]
    return size


def _check_members(batch: object) -> None:
    """Refuse what is no tuple, list or dict of tensors."""
    if isinstance(batch, Tensor):
        raise UsageError.for_value("batch", "a tensor", "a tuple or a dict of tensors", "write (batch,)")
    if not isinstance(batch, Mapping | Sequence):
        raise UsageError.for_value("batch", type(batch).__name__, "a tuple or a dict of tensors")
    for name, tensor in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
        if not isinstance(tensor, Tensor):
            raise UsageError.for_value(f"batch[{name!r}]", type(tensor).__name__, "a tensor")


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor of a batch."""
    if isinstance(batch, Mapping):
        return {name: function(tensor) for name, tensor in batch.items()}
    return tuple(function(tensor) for tensor in batch)


def check_losses(losses: Tensor, num_examples: int | None = None) -> None:
    """Refuse everything but one differentiable loss per example.

    A loss of shape (N, 1) would broadcast against clip factors of shape (N,) into an (N, N) product, so that
    every example is weighted by everybody's factors and the sensitivity is no longer C.

    Raises:
        LossShapeError: `losses` is not a floating-point vector with `num_examples` entries.
    """
    wanted = "(N,)" if num_examples is None else f"({num_examples},)"
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise LossShapeError.for_value("loss", got, f"one loss per example, shape {wanted}", "reduce per example")
    if num_examples is not None and losses.shape[0] != num_examples:
        raise LossShapeError.for_value("loss", tuple(losses.shape), f"one loss per example, shape {wanted}")
    if not losses.requires_grad:
        raise LossShapeError.for_value(
            "loss", "a constant", "losses with a graph", "compute them from the model's output, with gradients on"
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take gradients, tied ones once.

    Raises:
        UsageError: There is none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError("model: it has no trainable parameter; unfreeze at least one")
    return parameters


def gradients_of(loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradients of a scalar; what `.grad` held is put back.

    By `backward`, because reentrant activation checkpointing refuses `torch.autograd.grad`.

    Args:
        loss: A scalar with its graph, which is freed.
        parameters: Leaves; one the loss does not use has `None`.
    """
    leaves = list(parameters)
    with gradients_aside(leaves):
        loss.backward()  # type: ignore[no-untyped-call]
        return [leaf.grad for leaf in leaves]


@contextlib.contextmanager
def gradients_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Take what leaves have in `.grad` away, and put it back."""
    earlier = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in earlier:
            leaf.grad = None
        yield
    finally:
        for leaf, grad in earlier:
            leaf.grad = grad


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """Return ``min(1, C / (norm + 1e-6))`` per example, and 0 where the norm is not finite.

    Args:
        norms: (N,) norms of the per-example gradients, roots of float32 numbers or better.
        max_grad_norm: C.

    **Guarantees**: factor * norm <= C. **Edge cases**: norm 0 gives 1; infinity and NaN give 0, that is, the
    example is dropped; an empty batch gives an empty tensor.
    """
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))
