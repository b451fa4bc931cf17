"""Triton kernels: per-example gradient norms, clipped sums. Imported only where they run: a CPU needs no triton.

Shapes: N examples, T positions, d inputs, p outputs. A norm's program takes one tile of one example's products, squares
or multiplies it while it is in registers, and writes one number; `tiled.squared_norms` adds up the numbers. A sum's
program takes one tile of the weight and weighs one example's product after the other. There are no atomics, so a
launch is deterministic.

What is tuned is the depth of the pipeline alone: it decides when operands are fetched, not what is computed. Tiles
and warps, which decide the order of additions, follow from shapes and dtype. So runs whose timings differ agree.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs the kernels in Python, on the CPU (TRITON_INTERPRET=1)."""

PIPELINE_DEPTHS = (3,) if INTERPRETED else (2, 3, 4)
"""Candidates for the tuner."""


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    left,
    left_row,
    left_inner,
    num_rows,
    right,
    right_row,
    right_inner,
    num_columns,
    inner,
    row,
    column,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the (TILE, TILE) float32 tile of ``left @ right^T`` at (row, column); zeros past the edges.

    `left` (num_rows, inner) and `right` (num_columns, inner) are pointers with any strides; offsets are int64.
    "ieee" multiplies float32 operands as they are: TF32 would put an error of 1e-3 into the norm.
    """
    rows = row + tl.arange(0, TILE)
    columns = column + tl.arange(0, TILE)
    index = tl.arange(0, BLOCK)
    left_tile = left + rows.to(tl.int64)[:, None] * left_row + index.to(tl.int64)[None, :] * left_inner
    right_tile = right + index.to(tl.int64)[:, None] * right_inner + columns.to(tl.int64)[None, :] * right_row
    left_step = tl.full((), BLOCK, tl.int64) * left_inner
    right_step = tl.full((), BLOCK, tl.int64) * right_inner
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, inner, BLOCK):
        valid = index < inner - start
        x = tl.load(left_tile, mask=(rows < num_rows)[:, None] & valid[None, :], other=0.0)
        y = tl.load(right_tile, mask=valid[:, None] & (columns < num_columns)[None, :], other=0.0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="ieee")
        left_tile += left_step
        right_tile += right_step
    return total


@triton.jit
def gram_kernel(  # type: ignore[no-untyped-def]
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    partial,
    positions,
    width,
    out_width,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write ``sum(A_j A_k^T * G_j G_k^T)``, twice that off the diagonal, for one example and one pair j <= k.

    As many numbers further on as there are programs, the sum of the same terms' absolute values.

    The triangle of pairs is folded into a rectangle: a row of it holds tile row `upper`, then tile row `lower` from
    the other end, which together are as long as every other row's.
    """
    tiles = tl.cdiv(positions, TILE)
    pairs = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    example = (program // pairs).to(tl.int64)
    folded = tiles + 1 - tiles % 2
    upper = program % pairs // folded
    place = program % pairs % folded
    lower = tiles - 1 - upper + tiles % 2
    in_upper = place < tiles - upper
    j = tl.where(in_upper, upper, lower)
    k = j + tl.where(in_upper, place, place - (tiles - upper))
    a += example * a_example
    g += example * g_example
    gram_a = _product(
        a, a_position, a_feature, positions, a, a_position, a_feature, positions, width,
        j * TILE, k * TILE, TILE, BLOCK, UPCAST,
    )  # fmt: skip
    gram_g = _product(
        g, g_position, g_feature, positions, g, g_position, g_feature, positions, out_width,
        j * TILE, k * TILE, TILE, BLOCK, UPCAST,
    )  # fmt: skip
    terms = gram_a * gram_g
    weight = tl.where(j == k, 1.0, 2.0)
    tl.store(partial + program, weight * tl.sum(tl.sum(terms, 1), 0))
    tl.store(partial + tl.num_programs(0) + program, weight * tl.sum(tl.sum(tl.abs(terms), 1), 0))


@triton.jit
def direct_kernel(  # type: ignore[no-untyped-def]
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    partial,
    positions,
    width,
    out_width,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the sum of squares of one (TILE, TILE) tile of one example's gradient ``g^T a``."""
    across = tl.cdiv(width, TILE)
    tiles = tl.cdiv(out_width, TILE) * across
    program = tl.program_id(0)
    example = (program // tiles).to(tl.int64)
    row = program % tiles // across
    column = program % tiles % across
    gradient = _product(
        g + example * g_example, g_feature, g_position, out_width,
        a + example * a_example, a_feature, a_position, width, positions,
        row * TILE, column * TILE, TILE, BLOCK, UPCAST,
    )  # fmt: skip
    tl.store(partial + program, tl.sum(tl.sum(gradient * gradient, 1), 0))


@triton.jit
def weighted_sum_kernel(  # type: ignore[no-untyped-def]
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    factors,
    out,
    examples,
    examples_a_split,
    positions,
    width,
    out_width,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write one (TILE, TILE) tile of ``sum_i c_i g_i^T a_i`` over a group of examples, or add it to what is there.

    An example's product is complete before it is weighed: weighing an operand would round it. A dropped example,
    whose factor is 0, is a product over no position, so that 0 times infinity does not arise.
    """
    across = tl.cdiv(width, TILE)
    tiles = tl.cdiv(out_width, TILE) * across
    program = tl.program_id(0)
    split = program // tiles
    row = program % tiles // across * TILE
    column = program % tiles % across * TILE
    first = split * examples_a_split
    total = tl.zeros((TILE, TILE), tl.float32)
    for example in range(first, min(first + examples_a_split, examples)):
        factor = tl.load(factors + example)
        offset = tl.cast(example, tl.int64)
        product = _product(
            g + offset * g_example, g_feature, g_position, out_width,
            a + offset * a_example, a_feature, a_position, width, tl.where(factor == 0, 0, positions),
            row, column, TILE, BLOCK, UPCAST,
        )  # fmt: skip
        total += factor * product
    rows = row + tl.arange(0, TILE)
    columns = column + tl.arange(0, TILE)
    place = (split.to(tl.int64) * out_width + rows[:, None]) * width + columns[None, :]
    inside = (rows < out_width)[:, None] & (columns < width)[None, :]
    if ADD:
        total += tl.load(out + place, mask=inside, other=0.0)
    tl.store(out + place, total, mask=inside)


def gram_partials(a: Tensor, g: Tensor, partial: Tensor, tile: int) -> None:
    """Fill `partial` with addends of ``sum((a_i a_i^T) * (g_i g_i^T))``.

    Args:
        a: (N, T, d) inputs, float32, bf16 or float16, any strides.
        g: (N, T, p) output gradients of the same dtype.
        partial: (2, N, pairs of tiles) float32: of the terms, and of their absolute values.
        tile: Positions a side, a power of two >= 16.
    """
    _launch(_GRAM, a, g, partial, tile, inner=max(a.shape[2], g.shape[2]))


def direct_partials(a: Tensor, g: Tensor, partial: Tensor, tile: int) -> None:
    """Fill `partial`, (1, N, tiles of a (p, d) matrix), by addends of ``|g_i^T a_i|_F^2``; else as `gram_partials`."""
    _launch(_DIRECT, a, g, partial, tile, inner=a.shape[1])


def weighted_sums(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, add: bool, tile: int) -> None:
    """Write or add ``sum_i c_i g_i^T a_i`` over equal groups of examples.

    Not tuned: the tuner runs a launch several times, and this one may add to its output.

    Args:
        a: (N, T, d) inputs, bf16 or float16, any strides.
        g: (N, T, p) output gradients of the same dtype.
        factors: (N,) float32, contiguous.
        out: (S, p, d) float32, contiguous.
        add: Add to `out` instead of writing over it.
        tile: Side of a tile of (p, d), a power of two >= 16.
    """
    examples, splits = a.shape[0], out.shape[0]
    sizes = (examples, -(-examples // splits), a.shape[1], a.shape[2], g.shape[2])
    programs = splits * -(-g.shape[2] // tile) * -(-a.shape[2] // tile)
    constants = {"ADD": add, "TILE": tile, **_fetched(a, inner=a.shape[1])}
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        weighted_sum_kernel[(programs,)](
            a, *a.stride(), g, *g.stride(), factors, out, *sizes, **constants, num_warps=num_warps(tile), num_stages=3
        )


def _fetched(a: Tensor, inner: int) -> dict[str, int | bool]:
    """Return how operands are fetched. Triton's interpreter holds bf16 as integers and would multiply those."""
    return {"BLOCK": block(inner, a.dtype), "UPCAST": INTERPRETED and a.dtype == torch.bfloat16}


def _launch(kernels: dict[int, Any], a: Tensor, g: Tensor, partial: Tensor, tile: int, inner: int) -> None:
    """Run one program for every entry of `partial[0]`."""
    sizes = (a.shape[1], a.shape[2], g.shape[2])
    constants = {"TILE": tile, **_fetched(a, inner)}
    with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
        kernels[num_warps(tile)][(partial[0].numel(),)](a, *a.stride(), g, *g.stride(), partial, *sizes, **constants)


def num_warps(tile: int) -> int:
    """Return the warps of a program: two tiles of 128 x 128 float32 fill half of the registers of eight."""
    return 8 if tile == 128 else 4


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


def _by_warps(kernel: Any) -> dict[int, Any]:
    """Return a tuned kernel per number of warps."""
    return {warps: tuned(kernel, warps, PIPELINE_DEPTHS) for warps in (4, 8)}


_GRAM = _by_warps(gram_kernel)
_DIRECT = _by_warps(direct_kernel)
