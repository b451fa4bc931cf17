"""A value made of raw parameters alone, read where examples are: one copy and one gradient an example.

Shapes: N examples. A value of shape S is read as (N, *S), its gradient comes back as (N, *S), and the derivation that
made the value from the parameters is differentiated once for each example.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_dp.clipping.contributions import Contribution, Direct, float32
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.precision import full_float32


class Receiver(Protocol):
    """What a reading needs of an engine."""

    def expect(self, parameters: Iterable[nn.Parameter], reads: float = 1) -> None:
        """Count reads of each parameter."""

    def receive_rows(self, parameter: nn.Parameter, part: Contribution, leading: int) -> None:
        """Take what one read contributes, with `leading` rows."""


class _PerExample(torch.autograd.Function):
    """Repeats a value for every example; its backward hands the gradients of the copies to the engine."""

    @staticmethod
    def forward(ctx: Any, reading: "_Reading", rows: int, value: Tensor) -> Tensor:
        ctx.reading = reading
        return value.expand(rows, *value.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (g,) = gradients
        with torch._C.DisableTorchFunction(), hardware().norm_scope(), full_float32():
            ctx.reading.receive(g)
        return None, None, None


class _Reading:
    """One read of a value: where its per-example gradients go."""

    def __init__(self, receiver: Receiver, value: Tensor, parameters: tuple[nn.Parameter, ...], own_rows: bool) -> None:
        self.receiver, self.value, self.parameters, self.own_rows = receiver, value, parameters, own_rows

    def receive(self, g: Tensor) -> None:
        """Take the gradients of the copies, (N, ...)."""
        for parameter, gradient in zip(self.parameters, self._pulled_back(g), strict=True):
            if gradient is None:  # the derivation does not use it after all
                gradient = float32(g.new_zeros(1)).expand(g.shape[0], *parameter.shape)
            self.receiver.receive_rows(parameter, Direct(float32(gradient)), len(g))

    def _pulled_back(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the parameters' gradients by example, (N, *shape)."""
        rows = g.shape[0]
        if self.own_rows:
            return self._row_by_row(g)
        g = g.reshape(rows, *self.value.shape)
        if self.parameters[0] is self.value:
            return (g,)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            self.value, self.parameters, g, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return found

    def _row_by_row(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """Do the same for a value that has a row for every example already; without N x N gradients."""
        found: list[tuple[Tensor | None, ...]] = []
        for row, gradient in enumerate(g):
            only = torch.zeros_like(self.value)
            only[row] = gradient
            found.append(torch.autograd.grad(self.value, self.parameters, only, retain_graph=True, allow_unused=True))
        return tuple(
            None if any(part is None for part in column) else torch.stack([part for part in column if part is not None])
            for column in zip(*found, strict=True)
        )


def read(receiver: Receiver, value: Tensor, parameters: tuple[nn.Parameter, ...], rows: int, rank: int) -> Tensor:
    """Return a value with a copy for every example in front, (rows, ...), of `rank` dimensions.

    Args:
        receiver: Gets the per-example gradients in the backward pass.
        value: Made of raw parameters alone, with its graph; at most `rank` dimensions. Where it has all of them, the
            first is 1 or already the examples'.
        parameters: Those it was made of.
        rows: N.
        rank: Dimensions of what it is combined with.

    Returns:
        A view that broadcasts as `value` does.
    """
    receiver.expect(parameters)
    if value.dim() == rank and value.shape[0] == rows > 1:
        if value.stride(0) != 0:
            reading = _Reading(receiver, value, parameters, own_rows=True)
            return _applied(reading, rows, value)
        value = value[:1]  # expanded over the examples: one row stands for all
    reading = _Reading(receiver, value, parameters, own_rows=False)
    return _applied(reading, rows, value[(None,) * (rank - value.dim())] if value.dim() < rank else value)


def _applied(reading: _Reading, rows: int, value: Tensor) -> Tensor:
    copies: Tensor = _PerExample.apply(reading, rows, value)  # type: ignore[no-untyped-call]
    return copies
