"""The Triton kernels as torch operators: grids, and what a prediction needs to know of their results.

Operators, so that a prediction under FakeTensorMode and torch.compile see a result and need neither GPU nor triton.

Shapes: N examples, T positions, d inputs, p outputs, S splits; inputs a (N, T, d), output gradients g (N, T, p).
"""

import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dit_dp.clipping.hardware import hardware
from dit_dp.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take. float64, which tests use, has none."""

MIN_POSITIONS = 16
"""Fewest positions for which a clipped sum runs the kernel: the shortest inner product of a tensor core."""

LONG = 512
"""From so many positions on a clipped sum takes an example's product whole."""

PROGRAMS = 132
"""Programs that fill a GPU: an H100's multiprocessors, each of which holds one program of tile 128 (192 KiB of
operands). A constant, so that sums agree anywhere."""

PARTS_BYTES, MOST_SPLITS = 64 * 2**20, 32
"""Into how many groups examples are split at most: so many, and so many bytes of their sums."""


def runs_kernels(operand: Tensor) -> bool:
    """Return whether the kernels take such operands: on CUDA, or under Triton's interpreter."""
    wanted = hardware().is_cuda(operand) or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and operand.dtype in DTYPES


def sums_by_kernel(a: Tensor, g: Tensor) -> bool:
    """Return whether the clipped sum of these operands is the kernel's: half precision, and not too few positions.

    float32 operands have a library's matrix product already. Below `MIN_POSITIONS`, as in adaLN layers (T = 1), the
    kernel would wait for memory once an example to multiply mostly padding, while the float32 product costs little:
    2 N T d p FLOPs, 0.5 GFLOP for DiT-XL's adaLN at N = 32, T = 1, about 8 us at 60 TFLOP/s, less than the 20 us that
    its gradient of 32 MB takes to be read and written.
    """
    half = a.dtype == g.dtype and a.dtype.itemsize == 2
    return half and a.shape[1] >= MIN_POSITIONS and runs_kernels(a)


def kernel_tile(size: int, dtype: torch.dtype) -> int:
    """Return the side of a kernel's tile: 128 for half precision, else 64, less for a smaller matrix.

    A program of tile t reads 2 t numbers an inner product of 2 t^2 operations: t / 2 FLOPs a byte of bf16.
    """
    return min(64 if dtype == torch.float32 else 128, max(16, 1 << (size - 1).bit_length()))


def _kernels() -> ModuleType:
    try:
        from dit_dp.clipping import kernel_calls
    except ModuleNotFoundError as error:
        raise UsageError(
            "device: flash_clip, and bf16 or float16 under any method, needs triton on CUDA; pip install triton, or "
            "use bookkeeping in float32"
        ) from error
    return kernel_calls


# --- norms --------------------------------------------------------------------------------------------------------


def _norm_grid(a: Tensor, g: Tensor, gram: bool) -> tuple[int, int]:
    """Return (tile, programs an example)."""
    if gram:
        tile = kernel_tile(a.shape[1], a.dtype)
        tiles = -(-a.shape[1] // tile)
        return tile, tiles * (tiles + 1) // 2
    tile = kernel_tile(max(a.shape[2], g.shape[2]), a.dtype)
    return tile, -(-a.shape[2] // tile) * -(-g.shape[2] // tile)


@torch.library.custom_op("dit_dp::norm_partials", mutates_args=())
def norm_partials(a: Tensor, g: Tensor, gram: bool) -> Tensor:
    """Return float32 addends of the squared norms, (1, N, programs an example), by `gram_kernel` or `direct_kernel`.

    Of Gram sums, (2, N, programs): the sums of the terms' absolute values too, which tell what rounding can have taken.
    """
    kernels = _kernels()
    tile, programs = _norm_grid(a, g, gram)
    partial = a.new_empty(1 + gram, a.shape[0], programs, dtype=torch.float32)
    (kernels.gram_partials if gram else kernels.direct_partials)(a, g, partial, tile)
    return partial


@norm_partials.register_fake
def _(a: Tensor, g: Tensor, gram: bool) -> Tensor:
    return a.new_empty(1 + gram, a.shape[0], _norm_grid(a, g, gram)[1], dtype=torch.float32)


@torch.library.custom_op("dit_dp::kept_gradients", mutates_args=())
def kept_gradients(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return per-example gradients, (N, p, d) float32, and addends of their squared norms, (1, N, programs).

    The squares are taken while a tile is in registers: read once more, gradients of d p numbers would cost about half
    of what forming them does.
    """
    tile, programs = _norm_grid(a, g, False)
    gradients = a.new_empty(a.shape[0], g.shape[2], a.shape[2], dtype=torch.float32)
    partial = a.new_empty(1, a.shape[0], programs, dtype=torch.float32)
    _kernels().direct_partials(a, g, partial, tile, gradients)
    return gradients, partial


@kept_gradients.register_fake
def _(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    gradients = a.new_empty(a.shape[0], g.shape[2], a.shape[2], dtype=torch.float32)
    return gradients, a.new_empty(1, a.shape[0], _norm_grid(a, g, False)[1], dtype=torch.float32)


@torch.library.custom_op("dit_dp::finished_norms", mutates_args=())
def finished_norms(partial: Tensor, lost_share: float, cancelled: float) -> Tensor:
    """Return squared norms, (N,) float32, from `norm_partials`, in one launch.

    Args:
        partial: (1 or 2, N, programs an example) float32.
        lost_share: Share of the terms' absolute values that rounding can have taken.
        cancelled: Share of a squared norm up to which that does not matter.
    """
    squares = partial.new_empty(partial.shape[1])
    _kernels().finished(partial, squares, lost_share, cancelled)
    return squares


@finished_norms.register_fake
def _(partial: Tensor, lost_share: float, cancelled: float) -> Tensor:
    return partial.new_empty(partial.shape[1])


# --- clipped sums -------------------------------------------------------------------------------------------------


def weighted_sum(a: Tensor, g: Tensor, factors: Tensor, grad: Tensor | None) -> Tensor:
    """Return ``grad + sum_i c_i g_i^T a_i``, (p, d), in place where there is a gradient.

    2 N T d p FLOPs on tensor cores, and 2 N T d p / 128 more to weigh. With tiles of t, programs read 2 N T d p / t
    numbers, t / 2 FLOPs a byte of bf16, nearly all from the second-level cache; from memory N T (d + p), and 4 d p
    bytes of the gradient, twice where one is added to. Where the tiles of (p, d) would leave much of the last round of
    `PROGRAMS` idle, S groups of examples are summed apart and then together: S d p numbers more, at most 64 MiB.

    Args:
        a: (N, T, d), bf16 or float16, any strides.
        g: (N, T, p) of the same dtype.
        factors: (N,) clip factors c_i; an example whose factor is 0 is not read: it may hold infinity or NaN.
        grad: (p, d) float32, contiguous, or `None` for zero.

    Raises:
        UsageError: triton is not installed.

    **Guarantees**: products of operands are exact, their sums and the factors float32, so that a contribution exceeds
    C by rounding to float32 alone; no atomics: the order of additions follows from the shapes.
    """
    factors = factors.float()
    splits = num_splits(a, g)
    if splits == 1:
        total = a.new_empty(g.shape[2], a.shape[2], dtype=torch.float32) if grad is None else grad
        weighted_sums(a, g, factors, total[None], grad is not None)
        return total
    parts = a.new_empty(splits, g.shape[2], a.shape[2], dtype=torch.float32)
    weighted_sums(a, g, factors, parts, False)
    total = torch.add(*parts) if splits == 2 else parts.sum(0)
    return total if grad is None else grad.add_(total)


@dataclass(frozen=True)
class SumTile:
    """What a program of clipped sums takes.

    Attributes:
        rows: Of the (p, d) weight.
        columns: Likewise.
        block: Positions multiplied at once.
        whole: Whether an example's product is weighed when it is complete; otherwise each block's is.
    """

    rows: int
    columns: int
    block: int
    whole: bool

    def count(self, out_width: int, width: int) -> int:
        """Return how many tiles a (p, d) weight has."""
        return -(-out_width // self.rows) * -(-width // self.columns)


def sum_tile(positions: int, width: int, out_width: int) -> SumTile:
    """Return the tile for operands (N, T, d), (N, T, p); it decides the order of additions, and so no device does.

    Measured on an H100 at DiT-XL's shapes, bf16: up to T = 256 blocks of 128 positions, weighed one by one, reach 430
    to 530 TFLOP/s, since the next example's are fetched meanwhile; from T = 512 on it pays to wait for an example's end
    and to take twice the tile: 620 TFLOP/s at T = 1024, against 530.
    """
    if positions < LONG:
        side = kernel_tile(max(width, out_width), torch.bfloat16)
        return SumTile(side, side, min(128, max(MIN_POSITIONS, 1 << (positions - 1).bit_length())), whole=False)
    rows, columns = kernel_tile(out_width, torch.bfloat16), kernel_tile(width, torch.bfloat16)
    if rows == columns == 128:
        rows, columns = (256, 128) if out_width >= width else (128, 256)
    return SumTile(rows, columns, 64, whole=True)


def num_splits(a: Tensor, g: Tensor) -> int:
    """Return into how many groups the examples are split, S: the fewest within 3 % of what wastes fewest programs."""
    tiles = sum_tile(a.shape[1], a.shape[2], g.shape[2]).count(g.shape[2], a.shape[2])
    most = max(1, min(a.shape[0], MOST_SPLITS, PARTS_BYTES // (4 * a.shape[2] * g.shape[2])))

    def rounds(splits: int) -> int:
        """Return the time that examples take, one after the other, all groups at once as far as there is room."""
        return -(-tiles * splits // PROGRAMS) * -(-a.shape[0] // splits)

    least = min(map(rounds, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if rounds(splits) <= 1.03 * least)


@torch.library.custom_op("dit_dp::weighted_sums", mutates_args=("out",))
def weighted_sums(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, add: bool) -> None:
    """Write the sums over each group of examples to `out`, (S, p, d) float32, or add them, by `weighted_sum_kernel`."""
    _kernels().weighted_sums(a, g, factors, out, add, sum_tile(a.shape[1], a.shape[2], g.shape[2]))


@weighted_sums.register_fake
def _(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, add: bool) -> None:
    return None
