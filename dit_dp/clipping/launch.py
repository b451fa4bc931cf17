"""The Triton kernels as torch operators: grids, and what a prediction needs to know of their results.

Operators, so that a prediction under FakeTensorMode and torch.compile see a result and need neither GPU nor triton.

Shapes: N examples, T positions, d inputs, p outputs, S splits; inputs a (N, T, d), output gradients g (N, T, p).
"""

import os
from types import ModuleType

import torch
from torch import Tensor

from dit_dp.clipping.hardware import hardware
from dit_dp.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take. float64, which tests use, has none."""

MIN_POSITIONS = 16
"""Fewest positions for which a clipped sum runs the kernel: the shortest inner product of a tensor core."""

PROGRAMS = 264
"""Programs that fill a GPU: two rounds of an H100's 132 multiprocessors, each of which holds one program of tile 128
(220 registers a thread). A constant, so that sums agree anywhere."""


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
        from dit_dp.clipping import kernels
    except ModuleNotFoundError as error:
        raise UsageError(
            "device: flash_clip, and bf16 or float16 under any method, needs triton on CUDA; pip install triton, or "
            "use bookkeeping in float32"
        ) from error
    return kernels


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


# --- clipped sums -------------------------------------------------------------------------------------------------


def weighted_sum(a: Tensor, g: Tensor, factors: Tensor, grad: Tensor | None) -> Tensor:
    """Return ``grad + sum_i c_i g_i^T a_i``, (p, d), in place where there is a gradient.

    2 N T d p FLOPs on tensor cores, and 2 N d p more to weigh. With tiles of t, programs read 2 N T d p / t numbers,
    t / 2 FLOPs a byte of bf16, nearly all from the second-level cache; from memory N T (d + p), and 4 d p bytes of the
    gradient, twice where one is added to. Where (p, d) has fewer than `PROGRAMS` tiles, S groups of examples are
    summed apart and then together: S d p numbers more, at most 2 `PROGRAMS` tiles, 35 MB.

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
    return parts.sum(0) if grad is None else grad.add_(parts.sum(0))


def num_splits(a: Tensor, g: Tensor) -> int:
    """Return into how many groups the examples are split, S, so that there are programs enough."""
    tile = kernel_tile(max(a.shape[2], g.shape[2]), a.dtype)
    tiles = -(-a.shape[2] // tile) * -(-g.shape[2] // tile)
    return min(a.shape[0], -(-PROGRAMS // tiles))


@torch.library.custom_op("dit_dp::weighted_sums", mutates_args=("out",))
def weighted_sums(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, add: bool) -> None:
    """Write the sums over each group of examples to `out`, (S, p, d) float32, or add them, by `weighted_sum_kernel`."""
    tile = kernel_tile(max(a.shape[2], g.shape[2]), a.dtype)
    _kernels().weighted_sums(a, g, factors, out, add, tile)


@weighted_sums.register_fake
def _(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, add: bool) -> None:
    return None
