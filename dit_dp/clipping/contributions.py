"""What one call of a layer contributes to per-example gradients, and the norms and clipped sums taken from it.

Shapes: N examples (privacy units), T positions (tokens, patches), d inputs, p outputs, D features.

A layer's weight gradient for example i is a sum over positions and over every call of the layer. A call adds
one contribution per parameter; contributions to one parameter, also through tied weights, are joined before the
norm is taken, so that cross terms count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.launch import finished_norms, kept_gradients, sums_by_kernel, weighted_sum
from dit_dp.clipping.units import Units

BLOCK_ROWS, MIN_BLOCK = 8, 32
"""Block rows of a Gram matrix that is taken by its upper triangle, and the fewest positions of one."""

GHOST_SHARE = (BLOCK_ROWS + 1) / (2 * BLOCK_ROWS)
"""Operations of the upper triangle over those of both Gram matrices."""

SCRATCH_BYTES = {False: 2**20, True: 64 * 2**20}
"""Examples are taken together as long as their Gram matrices or gradients stay below this; by whether it is CUDA.

On a CPU what fits into its second-level cache is fastest; on a GPU fewer, larger launches are."""

GRAM_ROUNDING = 8
"""Error of a Gram sum over float32's epsilon times the sum of its terms' absolute values, at most.

Two inner products and their product round to about 2^-24 each, of what they add up. Where all entries round alike, as
for positions that are equal up to their sign, 5 of these units were found, for other operands less than 1."""

TENSOR_CORE_DEPTH = 16
"""Half-precision products that a tensor core adds at once; the sum so far is then cut to float32, not rounded.

In trials on an H100 a Gram sum of DiT-XL's widths, 1152 and 4608, was too small by 250 units of `GRAM_ROUNDING`, where
360 such cuts are made."""

CANCELLED = 1e-4
"""Share of a squared norm that rounding may take without more ado: a contribution is then at most C (1 + 1e-4 / 2)."""

Kept = Callable[[], Tensor | None]
"""Says which units' contributions count, (N,) bool, `None`: all. Asked only where it matters: a GPU is waited for."""

OuterRule = Literal["ghost", "direct", "outer product"]

HALF = (torch.bfloat16, torch.float16)


def everyone() -> None:
    """Say that all units' contributions count."""


def float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are: norms are never accumulated below it."""
    return tensor.float() if tensor.dtype in HALF else tensor


def sum_float32(tensor: Tensor, dim: int) -> Tensor:
    """Return the sum over a dimension, accumulated and returned in float32 or better.

    On CUDA half-precision numbers are converted as they are read; a CPU's reduction would copy them, and slower.
    """
    if tensor.dtype in HALF and hardware().is_cuda(tensor):
        return tensor.sum(dim, dtype=torch.float32)
    return float32(tensor).sum(dim)


def bmm_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return the batched product of two stacks of matrices, accumulated and returned in float32 or better.

    A sum rounded to bf16 would move by more than C when one example is removed, since the rounding error grows with
    the sum and not with the example. Products of two bf16 numbers are exact in float32.
    """
    if a.dtype not in HALF:
        return torch.bmm(a, b)
    if hardware().is_cuda(a):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def lost_share(a: Tensor, g: Tensor) -> float:
    """Return the share of its terms' absolute values that a Gram sum of operands may lose, (N, T, d) and (N, T, p).

    Twice what all cuts of tensor cores together were seen to take, where they multiply.
    """
    cuts = (a.shape[2] + g.shape[2]) / TENSOR_CORE_DEPTH if a.dtype in HALF and hardware().is_cuda(a) else 0.0
    return float((GRAM_ROUNDING + 2 * cuts) * torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps)


def not_below(squares: Tensor, sizes: Tensor, share: float | None = None) -> Tensor:
    """Return Gram sums, raised by what rounding can have taken where that is more than `CANCELLED` of them.

    Where positions cancel, a Gram sum is small beside its terms, and float32 leaves little of it or nothing: the norm
    would be too small by any factor, and the contribution as much above C. Raised, it is clipped more than it need be.

    Args:
        squares: (N,) sums of the terms.
        sizes: (N,) sums of the terms' absolute values, or more.
        share: Of `sizes` that may be lost; default: by rounding to the dtype of the sums.
    """
    lost = (GRAM_ROUNDING * torch.finfo(squares.dtype).eps if share is None else share) * sizes
    return torch.where(lost > CANCELLED * squares, squares + lost, squares)


@dataclass(frozen=True)
class Outer:
    """Per-example gradient ``g_i^T a_i`` of a weight seen as a (p, d) matrix; a (N, T, d), g (N, T, p)."""

    a: Tensor
    g: Tensor

    def gradients(self, shape: torch.Size) -> Tensor:
        """Return the per-example gradients, (N, *shape)."""
        return bmm_float32(self.g.transpose(1, 2), self.a).view(-1, *shape)

    def kept(self, shape: torch.Size) -> "tuple[Direct, Tensor]":
        """Return the per-example gradients and their squared norms, (N,); half precision on CUDA by one kernel."""
        if self.by_kernel:
            gradients, partial = kept_gradients(self.a, self.g)
            return Direct(gradients.view(-1, *shape)), finished_norms(partial, 0.0, CANCELLED)
        kept = Direct(self.gradients(shape))
        return kept, kept.rowwise_squared_norms()

    def by_unit(self, units: Units) -> "Outer":
        """Return the contribution of units: the positions of a unit's rows are its positions."""
        return Outer(units.gather(self.a).flatten(1, 2), units.gather(self.g).flatten(1, 2))

    def squared_norms(self, rule: OuterRule | None = None) -> Tensor:
        """Return ``|g_i^T a_i|_F^2``, (N,), by a rule; default: the one that needs fewest operations.

        ghost (Li et al. 2021, arXiv 2110.05679): ``sum((a_i a_i^T) * (g_i g_i^T))``, by symmetry 0.56 T^2 (d + p)
        multiply-adds; direct: the product itself, T d p; outer product, at T = 1: ``|a_i|^2 |g_i|^2``.
        """
        rule = rule or self.rule(self.a.shape[1], self.a.shape[2], self.g.shape[2])
        return hardware().apply(_squared_norms, self.a, self.g, rule)

    def add_clipped(self, grad: Tensor | None, factors: Tensor, shape: torch.Size, kept: Kept) -> Tensor:
        """Return ``grad + sum_i c_i g_i^T a_i``; scales the narrower operand, never the one in place.

        The weights are applied in float32, also to bf16 operands: rounding ``c_i a_i`` to bf16 would let a
        contribution exceed C by up to 2^-8 |g_i| |a_i|, which cancellation over positions can make far more than 2^-8.
        On CUDA a kernel weighs each example's product in registers; elsewhere bf16 operands are copied to float32.
        """
        a, g = self.a, self.g
        ready = grad is None or (grad.dtype == torch.float32 and grad.is_contiguous())
        if ready and self.by_kernel:
            flat = None if grad is None else grad.view(g.shape[2], -1)
            return weighted_sum(a, g, factors, flat).view(shape)
        keep = kept()
        if keep is not None:
            a, g = torch.where(keep[:, None, None], a, 0), torch.where(keep[:, None, None], g, 0)
        a, g = float32(a), float32(g)
        weights = factors[:, None, None].to(a.dtype)
        a, g = (a * weights, g) if a.shape[2] <= g.shape[2] else (a, g * weights)
        left, right = g.flatten(0, 1).T, a.flatten(0, 1)
        if grad is None or grad.dtype != left.dtype or not grad.is_contiguous():
            return _added(grad, (left @ right).view(shape))
        grad.view(left.shape[0], -1).addmm_(left, right)
        return grad

    @property
    def by_kernel(self) -> bool:
        """Whether the clipped sum is a kernel's, which passes dropped units over by their factor."""
        return sums_by_kernel(self.a, self.g)

    @staticmethod
    def rule(positions: int, width: int, out_width: int) -> OuterRule:
        """Return the rule that needs fewest operations for these shapes."""
        if positions == 1:
            return "outer product"
        ghost = GHOST_SHARE * positions * (width + out_width) < width * out_width
        return "ghost" if ghost else "direct"


def _squared_norms(a: Tensor, g: Tensor, rule: OuterRule) -> Tensor:
    """Return squared norms, (N,), by a rule; a few examples at a time."""
    if rule == "outer product":
        a, g = float32(a), float32(g)
        return a.square().sum((1, 2)) * g.square().sum((1, 2))
    positions = a.shape[1]
    scratch = 8 * _block(positions) * positions if rule == "ghost" else 4 * a.shape[2] * g.shape[2]
    together = max(1, SCRATCH_BYTES[hardware().is_cuda(a)] // scratch)
    norms = _ghost_norms if rule == "ghost" else _direct_norms
    squares = a.new_empty(len(a), dtype=torch.promote_types(a.dtype, torch.float32))
    for index in hardware().rounds(-(-len(a) // together)):
        chunk = slice(index * together, (index + 1) * together)
        squares[chunk] = norms(a[chunk], g[chunk])
    return squares.clamp_(min=0)  # a Gram sum of a zero gradient can round below zero


def _block(positions: int) -> int:
    """Return the positions of one block row."""
    return max(MIN_BLOCK, -(-positions // BLOCK_ROWS))


def _ghost_norms(a: Tensor, g: Tensor) -> Tensor:
    """Return squared norms, (N,), from block rows of the Gram matrices, each from its own column block on."""
    positions = a.shape[1]
    block = _block(positions)
    total = a.new_zeros(len(a), dtype=torch.promote_types(a.dtype, torch.float32))
    sizes = torch.zeros_like(total)
    for j in range(0, positions, block):
        gram = bmm_float32(a[:, j : j + block], a[:, j:].transpose(1, 2))
        gram.mul_(bmm_float32(g[:, j : j + block], g[:, j:].transpose(1, 2)))
        total += 2 * gram.sum((1, 2)) - gram[:, :, :block].sum((1, 2))
        sizes += 2 * gram.abs_().sum((1, 2))
    return not_below(total, sizes, lost_share(a, g))


def _direct_norms(a: Tensor, g: Tensor) -> Tensor:
    """Return squared norms, (N,), of per-example gradients that are formed and dropped."""
    return bmm_float32(g.transpose(1, 2), a).square_().sum((1, 2))


@dataclass(frozen=True)
class Rows:
    """Per-example gradient of an embedding table: rows g (N, T, D) added at indices (N, T)."""

    index: Tensor
    g: Tensor

    def gradients(self, shape: torch.Size) -> Tensor:
        """Return the per-example gradients, (N, *shape)."""
        g = float32(self.g)
        out = g.new_zeros(g.shape[0], *shape)
        return out.scatter_add_(1, self.index[..., None].expand_as(g), g)

    def by_unit(self, units: Units) -> "Rows":
        """Return the contribution of units; padding is a zero gradient at index 0."""
        return Rows(units.gather(self.index).flatten(1, 2), units.gather(self.g).flatten(1, 2))

    def squared_norms(self) -> Tensor:
        """Return squared norms, (N,): products of rows that fall on the same index, without the table."""
        g = float32(self.g)
        if g.shape[1] == 1:
            return g.square().sum((1, 2))
        gram = torch.bmm(g, g.transpose(1, 2)) * (self.index[:, :, None] == self.index[:, None, :])
        return not_below(gram.sum((1, 2)), gram.abs().sum((1, 2))).clamp(min=0)

    def add_clipped(self, grad: Tensor | None, factors: Tensor, shape: torch.Size, kept: Kept) -> Tensor:
        """Return ``grad`` with the weighted rows added."""
        g = float32(self.g)
        keep = kept()
        if keep is not None:
            g = torch.where(keep[:, None, None], g, 0)
        total = g.new_zeros(shape) if grad is None else grad
        rows = (g * factors[:, None, None].to(g.dtype)).flatten(0, 1)
        return total.index_add_(0, self.index.flatten(), rows.to(total.dtype))


@dataclass(frozen=True)
class Direct:
    """Per-example gradients themselves, (N, *shape): biases and scales, which are small."""

    value: Tensor

    def gradients(self, shape: torch.Size) -> Tensor:
        """Return the per-example gradients, (N, *shape)."""
        return float32(self.value).view(-1, *shape)

    def by_unit(self, units: Units) -> "Direct":
        """Return the sums over each unit's rows."""
        return Direct(units.sum(float32(self.value)))

    def squared_norms(self) -> Tensor:
        """Return squared norms, (N,)."""
        return float32(self.value).reshape(len(self.value), -1).square().sum(1)

    def rowwise_squared_norms(self) -> Tensor:
        """Return the same without a copy: for values as large as a weight.

        A CPU is fastest at one product an example, a GPU at one reduction of all.
        """
        value = float32(self.value).flatten(1)
        if hardware().is_cuda(value):
            norms: Tensor = torch.linalg.vector_norm(value, dim=1)
            return norms.square()
        return torch.stack([row.dot(row) for row in value])

    def add_clipped(self, grad: Tensor | None, factors: Tensor, shape: torch.Size, kept: Kept) -> Tensor:
        """Return ``grad + sum_i c_i value_i``."""
        value = float32(self.value).reshape(len(self.value), -1)
        keep = kept()
        if keep is not None:
            value = torch.where(keep[:, None], value, 0)
        weights = factors.to(value.dtype)
        if grad is None or grad.dtype != value.dtype or not grad.is_contiguous():
            return _added(grad, (weights @ value).view(shape))
        grad.view(-1).addmv_(value.T, weights)  # each number of the gradient is read and written once
        return grad


Contribution = Outer | Rows | Direct


def _added(grad: Tensor | None, more: Tensor) -> Tensor:
    """Return the sum, in place where there is something to add to."""
    return more if grad is None else grad.add_(more.to(grad.dtype))


def joined(outers: list[Outer]) -> Outer:
    """Return several calls of one weight as one over the union of their positions."""
    if len(outers) == 1:
        return outers[0]
    return Outer(torch.cat([part.a for part in outers], 1), torch.cat([part.g for part in outers], 1))


def joined_squared_norms(contributions: list[Contribution], shape: torch.Size) -> Tensor:
    """Return the squared norm of the sum of contributions to one parameter, (N,).

    Several `Outer` of one weight are one `Outer` over the union of their positions; other mixtures (an
    embedding tied to a linear) are added up as gradients.
    """
    if len(contributions) == 1:
        return contributions[0].squared_norms()
    outers = [c for c in contributions if isinstance(c, Outer)]
    if len(outers) == len(contributions):
        return joined(outers).squared_norms()
    total = contributions[0].gradients(shape)
    for contribution in contributions[1:]:
        total = total + contribution.gradients(shape)
    return Direct(total).squared_norms()
