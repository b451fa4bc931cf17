"""Per-example gradient norms of a linear layer, tile by tile: neither T x T nor d x p numbers an example are held.

Shapes: N examples, T positions, d inputs, p outputs; inputs a (N, T, d), output gradients g (N, T, p). The gradient of
example i is ``g_i^T a_i``, (p, d), and its squared norm is, whichever takes fewer operations,

- *ghost* (Li et al., arXiv 2110.05679): ``sum((a_i a_i^T) * (g_i g_i^T))`` over tiles (j, k) of positions with j <= k,
  those off the diagonal twice: T (T + tile) (d + p) FLOPs;
- *direct*: the gradient, its tiles squared and summed as they come: 2 T d p FLOPs;
- at T = 1: ``|a_i|^2 |g_i|^2``.

On CUDA the tiles live in registers (`kernels`); elsewhere in a scratch that stays in a core's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_dp.clipping.contributions import CANCELLED, Outer, OuterRule, float32, lost_share, not_below
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.launch import finished_norms, kernel_tile, norm_partials, runs_kernels

SCRATCH = 2**17
"""Numbers of scratch: 512 KiB in float32, half of a usual second-level cache."""

SPAN = 1024
"""Longest side of a tile: long enough for matrix products at full speed beside 64 of the other side."""


def norm_rule(positions: int, width: int, out_width: int, tile: int = 0) -> OuterRule:
    """Return the rule that needs fewer operations: T (T + tile) (d + p) / 2 against T d p multiply-adds."""
    if positions == 1:
        return "outer product"
    return "ghost" if (positions + tile) * (width + out_width) < 2 * width * out_width else "direct"


def norm_rule_of(a: Tensor, g: Tensor) -> OuterRule:
    """Return the rule for operands: a kernel's tiles are large enough to count, a CPU's are not."""
    tile = kernel_tile(a.shape[1], a.dtype) if runs_kernels(a) else 0
    return norm_rule(a.shape[1], a.shape[2], g.shape[2], tile)


def squared_norms(a: Tensor, g: Tensor) -> Tensor:
    """Return ``|g_i^T a_i|_F^2``, (N,), in float32, or float64 for float64 operands.

    Args:
        a: (N, T, d) inputs, N >= 1, any strides.
        g: (N, T, p) output gradients of the same dtype.

    Raises:
        UsageError: The operands are on a CUDA device and triton is not installed.

    **Guarantees**: products of half-precision operands are exact, their sums float32; the result is deterministic.
    **Edge cases**: an infinity or NaN in an example makes its norm infinite or NaN, and nobody else's; so does a
    Gram entry beyond float32.
    """
    rule = norm_rule_of(a, g)
    if rule == "outer product":
        return Outer(a, g).squared_norms(rule)
    if runs_kernels(a):
        squares: Tensor = finished_norms(norm_partials(a, g, rule == "ghost"), lost_share(a, g), CANCELLED)
        return squares
    squares = hardware().apply(gram_squares if rule == "ghost" else direct_squares, a, g)
    return squares.clamp(min=0)  # a Gram sum of a zero gradient can round below zero


def gram_squares(a: Tensor, g: Tensor) -> Tensor:
    """Return ``sum((a_i a_i^T) * (g_i g_i^T))``, (N,), `not_below` what float32 can tell.

    A strip of `rows` positions meets all from its own on, in pieces of `SPAN`. Pieces are laid out (later, earlier)
    so that the strip's own square is the first's head, contiguous; it was counted twice with the rest.
    """
    examples, positions, _ = a.shape
    rows = min(positions, 48 if positions <= 512 else 64)  # fewer: fewer operations; more: faster products
    span = min(positions, SPAN)
    together = min(examples, SCRATCH // (2 * rows * span))
    scratch = _scratch(a, 2, together * rows * span)
    parts = []
    for x, y in _few_examples(a, g, together):
        total, sizes = x.new_zeros(2, x.shape[0])
        for j in range(0, positions, rows):
            for k in range(j, positions, span):
                gram = _product(x[:, k : k + span], x[:, j : j + rows].transpose(1, 2), scratch[0])
                gram.mul_(_product(y[:, k : k + span], y[:, j : j + rows].transpose(1, 2), scratch[1]))
                total.add_(gram.sum((1, 2)), alpha=2)
                if k == j:
                    total.sub_(gram[:, : gram.shape[2]].sum((1, 2)))
                sizes.add_(gram.abs_().sum((1, 2)), alpha=2)
        parts.append(not_below(total, sizes))
    return torch.cat(parts)


def direct_squares(a: Tensor, g: Tensor) -> Tensor:
    """Return ``|g_i^T a_i|_F^2``, (N,), from tiles of the gradient."""
    examples, _, width = a.shape
    span = min(width, SPAN)
    strips = -(-g.shape[2] // (SCRATCH // span))
    rows = -(-g.shape[2] // strips)
    together = min(examples, SCRATCH // (rows * span))
    scratch = _scratch(a, 1, together * rows * span)[0]
    parts = []
    for x, y in _few_examples(a, g, together):
        total = x.new_zeros(x.shape[0])
        for j in range(0, g.shape[2], rows):
            for k in range(0, width, span):
                tile = _product(y[:, :, j : j + rows].transpose(1, 2), x[:, :, k : k + span], scratch)
                total.add_(tile.square_().sum((1, 2)))
        parts.append(total)
    return torch.cat(parts)


def _product(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """Return the batched matrix product, held in the scratch."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=scratch[: shape[0] * shape[1] * shape[2]].view(shape))


def _scratch(like: Tensor, count: int, numbers: int) -> Tensor:
    """Return `count` buffers in the dtype norms are taken in."""
    return like.new_empty(count, numbers, dtype=torch.promote_types(like.dtype, torch.float32))


def _few_examples(a: Tensor, g: Tensor, together: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the operands of a few examples at a time; half precision as float32, never all of it."""
    for start in range(0, a.shape[0], together):
        chunk = slice(start, start + together)
        yield float32(a[chunk]), float32(g[chunk])
