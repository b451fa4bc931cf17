"""How the Triton kernels are called: operands, tiles, warps, depth of the pipeline. Imported only where they run.

What is tuned is the depth of the pipeline alone: it decides when operands are fetched, not what is computed. Tiles
and warps, which decide the order of additions, follow from shapes and dtype. So runs whose timings differ agree.

Shapes: N examples, T positions, d inputs, p outputs.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_dp.clipping.kernels import direct_kernel, finished_kernel, gram_kernel, weighted_sum_kernel
from dit_dp.clipping.launch import SumTile

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs the kernels in Python, on the CPU (TRITON_INTERPRET=1)."""

PIPELINE_DEPTHS = (3,) if INTERPRETED else (2, 3, 4)
"""Candidates for the tuner."""

MOST_BLOCKS = 4
"""Blocks of operands that a program of clipped sums has under way, if its multiprocessor's memory holds as many."""

RESERVED_BYTES = 3072
"""Of a multiprocessor's shared memory, what the driver takes and what a program takes besides operands."""


def gram_partials(a: Tensor, g: Tensor, partial: Tensor, tile: int) -> None:
    """Fill `partial` with addends of ``sum((a_i a_i^T) * (g_i g_i^T))``.

    Args:
        a: (N, T, d) inputs, float32, bf16 or float16, any strides.
        g: (N, T, p) output gradients of the same dtype.
        partial: (2, N, pairs of tiles) float32: of the terms, and of their absolute values.
        tile: Positions a side, a power of two >= 16.
    """
    length = block(max(a.shape[2], g.shape[2]), a.dtype)
    _launch(_GRAM[gram_warps(tile)], a, g, (partial,), (tile, length), tile, length)


def direct_partials(a: Tensor, g: Tensor, partial: Tensor, tile: int, kept: Tensor | None = None) -> None:
    """Fill `partial`, (1, N, tiles of a (p, d) matrix), by addends of ``|g_i^T a_i|_F^2``; else as `gram_partials`.

    `kept`, (N, p, d) float32, contiguous, is filled with the gradients themselves, if they are wanted.
    """
    length = block(a.shape[1], a.dtype)
    written = (partial, partial if kept is None else kept)
    _launch(_DIRECT, a, g, written, (length, tile), tile, length, KEEP=kept is not None)


def finished(partial: Tensor, squares: Tensor, lost_share: float, cancelled: float) -> None:
    """Fill `squares`, (N,) float32, from the addends; see `contributions.not_below` for the two numbers."""
    sizes, examples, programs = partial.shape
    length = min(1024, max(16, 1 << (programs - 1).bit_length()))
    with torch.cuda.device_of(partial):  # type: ignore[no-untyped-call]
        finished_kernel[(examples,)](partial, squares, programs, lost_share, cancelled, SIZES=sizes > 1, BLOCK=length)


def weighted_sums(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, add: bool, tile: SumTile) -> None:
    """Write or add ``sum_i c_i g_i^T a_i`` over equal groups of examples.

    Not tuned: the tuner runs a launch several times, and this one may add to its output.

    Args:
        a: (N, T, d) inputs, bf16 or float16, any strides.
        g: (N, T, p) output gradients of the same dtype.
        factors: (N,) float32, contiguous.
        out: (S, p, d) float32, contiguous.
        add: Add to `out` instead of writing over it.
        tile: What a program takes.
    """
    examples, splits = a.shape[0], out.shape[0]
    sizes = (examples, -(-examples // splits), a.shape[1], a.shape[2], g.shape[2])
    x, a_layout = handed(a, tile.block, tile.columns)
    y, g_layout = handed(g, tile.block, tile.rows)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK": tile.block, "WHOLE": tile.whole, "ADD": add}
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        weighted_sum_kernel[(splits * tile.count(*out.shape[1:]),)](
            x, *a.stride(), y, *g.stride(), factors, out, *sizes, **constants,
            A_LAYOUT=a_layout, G_LAYOUT=g_layout, UPCAST=upcast(a),
            num_warps=sum_warps(tile), num_stages=sum_depth(tile, a),
        )  # fmt: skip


def handed(operand: Tensor, positions: int, features: int) -> tuple[Any, str]:
    """Return what a kernel is handed for a (N, T, D) operand that it reads by such tiles, and the layout."""
    if INTERPRETED or torch.cuda.get_device_capability(operand.device) >= (9, 0):
        for layout, seen, tile in (
            ("positions first", operand, [1, positions, features]),
            ("features first", operand.transpose(1, 2), [1, features, positions]),
        ):
            if is_describable(seen):
                return TensorDescriptor(seen, list(seen.shape), list(seen.stride()), tile), layout
    return operand, "pointers"


def is_describable(operand: Tensor) -> bool:
    """Return whether a descriptor can stand for an operand: rows without gaps, each at a multiple of 16 bytes."""
    steps = [step for step, size in zip(operand.stride()[:2], operand.shape[:2], strict=True) if size > 1]
    places = (operand.storage_offset(), *operand.stride()[:2])
    aligned = all(place * operand.element_size() % 16 == 0 for place in places)
    return operand.stride(2) == 1 and aligned and all(step > 0 for step in steps)


def upcast(operand: Tensor) -> bool:
    """Return whether operands are copied to float32: Triton's interpreter holds bf16 as integers, to be multiplied."""
    return INTERPRETED and operand.dtype == torch.bfloat16


def _launch(
    kernel: Any,
    a: Tensor,
    g: Tensor,
    written: tuple[Tensor, ...],
    fetched: tuple[int, int],
    tile: int,
    length: int,
    **options: bool,
) -> None:
    """Run one program for every entry of `written[0][0]`, whose tiles of operands are (positions, features)."""
    (x, a_layout), (y, g_layout) = handed(a, *fetched), handed(g, *fetched)
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        kernel[(written[0][0].numel(),)](
            x, *a.stride(), y, *g.stride(), *written, a.shape[1], a.shape[2], g.shape[2],
            TILE=tile, BLOCK=length, A_LAYOUT=a_layout, G_LAYOUT=g_layout, UPCAST=upcast(a), **options,
        )  # fmt: skip


def gram_warps(tile: int) -> int:
    """Return the warps of a program: two tiles of 128 x 128 float32 fill half of the registers of eight."""
    return 8 if tile == 128 else 4


def sum_warps(tile: SumTile) -> int:
    """Return the warps of a program of clipped sums, which holds two tiles too."""
    return 8 if tile.rows * tile.columns >= 128 * 128 else 4


def sum_depth(tile: SumTile, operand: Tensor) -> int:
    """Return how many blocks of operands are under way: what the multiprocessor holds."""
    each = (tile.rows + tile.columns) * tile.block * operand.element_size()
    if INTERPRETED:
        return 1
    there = int(torch.cuda.get_device_properties(operand.device).shared_memory_per_multiprocessor)
    return max(1, min(MOST_BLOCKS, (there - RESERVED_BYTES) // each))


def block(inner: int, dtype: torch.dtype) -> int:
    """Return how much of the summed dimension is fetched at once: a cache line of 128 bytes, or what there is."""
    return min(128 // dtype.itemsize, max(16, 1 << (inner - 1).bit_length()))


def tuned(kernel: Any, warps: int, depths: tuple[int, ...]) -> Any:
    """Return a kernel that times the pipeline depths once a shape, then keeps the fastest."""
    configs = [triton.Config({}, num_warps=warps, num_stages=depth) for depth in depths]
    return triton.autotune(configs, key=["positions", "width", "out_width"], do_bench=shortest)(kernel)


def shortest(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """Return the shortest of five timings in seconds, in place of every quantile that the tuner asks for.

    Triton's own benchmark flushes the cache through a buffer of 256 MB, which would count as the method's memory.
    """
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return [min(times)] * len(quantiles)


_GRAM = {warps: tuned(gram_kernel, warps, PIPELINE_DEPTHS) for warps in (4, 8)}
_DIRECT = tuned(direct_kernel, 4, PIPELINE_DEPTHS)
