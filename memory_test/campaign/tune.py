"""The Triton kernels by tile, warps, pipeline depth and block: time against ceilings, error against float64.

``python -m memory_test.campaign.tune KERNEL DTYPE FILE``, or ``... tune check`` for one small case of each kernel, for
compute-sanitizer to watch. Every candidate gets inputs of its own and an output full of NaN.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from dit_dp.clipping import kernel_calls, kernels, launch
from dit_dp.clipping.launch import SumTile
from memory_test.campaign.processes import KERNELS, record_of
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
TILES = {"bf16": (64, 128), "float32": (32, 64)}
WARPS, DEPTHS, BLOCKS = (4, 8), (2, 3, 4), (32, 64, 128)
WIDE = 256
"""Longer side of the widest tile of clipped sums."""

SHARED_BYTES = 225 * 2**10
"""What a program may fetch ahead into on an H100."""

SMALLEST_COPY, SQUARE = 2**30, 8192
"""Bytes of the copy, side of the product that ceilings are taken from."""

Bench = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Shape:
    """Operands of a linear layer: a (N, T, d), g (N, T, p)."""

    examples: int
    positions: int
    width: int
    out_width: int


SHAPES = {
    "gram": (Shape(32, 256, 1152, 4608), Shape(32, 256, 1152, 1152), Shape(8, 1024, 1152, 4608)),
    "direct": (Shape(32, 1024, 384, 384), Shape(8, 1024, 768, 768), Shape(1, 16384, 1152, 1152)),
    "sum": (Shape(32, 256, 1152, 4608), Shape(32, 256, 1152, 1152), Shape(8, 1024, 1152, 4608)),
}
"""Layers of DiT for which each is the one that runs."""


@dataclass(frozen=True)
class Candidate:
    """How a kernel is compiled."""

    tile: int
    warps: int
    depth: int
    block: int


def candidates(kernel: str, dtype: str) -> Iterator[Candidate]:
    """Yield what is tried."""
    tiles = (WIDE // 2, WIDE) if kernel == "sum" else TILES[dtype]
    for values in itertools.product(tiles, WARPS, DEPTHS, BLOCKS):
        yield Candidate(*values)


def sum_tile(how: Candidate, shape: Shape) -> SumTile:
    """Return what a program of clipped sums takes: squares by blocks, or whole examples by 256 of the longer side."""
    if how.tile < WIDE:
        return SumTile(how.tile, how.tile, how.block, whole=False)
    rows, columns = (WIDE, WIDE // 2) if shape.out_width >= shape.width else (WIDE // 2, WIDE)
    return SumTile(rows, columns, how.block, whole=True)


def is_current(candidate: Candidate, kernel: str, shape: Shape, dtype: torch.dtype) -> bool:
    """Return whether the engine compiles the kernel so; of norms it times the depths itself."""
    if kernel == "sum":
        tile = sum_tile(candidate, shape)
        chosen = launch.sum_tile(shape.positions, shape.width, shape.out_width)
        most = SHARED_BYTES // ((tile.rows + tile.columns) * tile.block * dtype.itemsize)
        depth = min(kernel_calls.MOST_BLOCKS, most)
        return (tile, candidate.warps, candidate.depth) == (chosen, kernel_calls.sum_warps(tile), depth)
    side = shape.positions if kernel == "gram" else max(shape.width, shape.out_width)
    inner = max(shape.width, shape.out_width) if kernel == "gram" else shape.positions
    square = launch.kernel_tile(side, dtype)
    warps = kernel_calls.gram_warps(square) if kernel == "gram" else 4
    wanted = (square, warps, kernel_calls.block(inner, dtype))
    return (candidate.tile, candidate.warps, candidate.block) == wanted


def flops(kernel: str, shape: Shape) -> int:
    """Return the operations that are needed: half of both Gram matrices, or the gradient's product."""
    n, t, d, p = shape.examples, shape.positions, shape.width, shape.out_width
    return n * t * (t + 1) * (d + p) if kernel == "gram" else 2 * n * t * d * p


def num_bytes(kernel: str, shape: Shape, element: int) -> int:
    """Return the fewest bytes that move: operands once, and the sum's output."""
    operands = shape.examples * shape.positions * (shape.width + shape.out_width) * element
    return operands + (4 * shape.width * shape.out_width if kernel == "sum" else 0)


def draw(shape: Shape, dtype: torch.dtype, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return fresh random operands and factors, one of which is 0."""
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = (shape.examples, shape.positions)
    a = torch.randn(*sizes, shape.width, generator=generator, device=device).to(dtype)
    g = torch.randn(*sizes, shape.out_width, generator=generator, device=device).to(dtype)
    factors = torch.rand(shape.examples, generator=generator, device=device)
    factors[0] = 0 if shape.examples > 1 else factors[0]
    return a, g, factors


def prepared(
    kernel: str, shape: Shape, a: Tensor, g: Tensor, factors: Tensor, how: Candidate
) -> tuple[Callable[[], object], Tensor]:
    """Return a launch, and its output, (1 or 2, N, programs) or (S, p, d), full of NaN."""
    n, t, d, p = shape.examples, shape.positions, shape.width, shape.out_width
    compiled: dict[str, Any] = {"BLOCK": how.block, "UPCAST": kernel_calls.upcast(a)}
    if kernel == "sum":
        tile, splits = sum_tile(how, shape), launch.num_splits(a, g)
        out = torch.full((splits, p, d), float("nan"), device=a.device)
        sizes = (n, -(-n // splits), t, d, p)
        (x, a_layout), (y, g_layout) = (
            kernel_calls.handed(a, how.block, tile.columns),
            kernel_calls.handed(g, how.block, tile.rows),
        )
        compiled |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "WHOLE": tile.whole, "ADD": False}
        compiled |= {"A_LAYOUT": a_layout, "G_LAYOUT": g_layout, "num_warps": how.warps, "num_stages": how.depth}
        inputs = (x, *a.stride(), y, *g.stride(), factors, out, *sizes)
        return lambda: kernels.weighted_sum_kernel[(splits * tile.count(p, d),)](*inputs, **compiled), out
    tiles = -(-t // how.tile)
    programs = tiles * (tiles + 1) // 2 if kernel == "gram" else -(-p // how.tile) * -(-d // how.tile)
    partial = torch.full((1 + (kernel == "gram"), n, programs), float("nan"), device=a.device)
    fetched = (how.tile, how.block) if kernel == "gram" else (how.block, how.tile)
    (x, a_layout), (y, g_layout) = kernel_calls.handed(a, *fetched), kernel_calls.handed(g, *fetched)
    compiled |= {"TILE": how.tile, "A_LAYOUT": a_layout, "G_LAYOUT": g_layout}
    function = kernels.gram_kernel if kernel == "gram" else kernels.direct_kernel
    tuned = kernel_calls.tuned(function, how.warps, (how.depth,))
    written = [partial]
    if kernel == "direct":
        written, compiled = [partial, partial], {**compiled, "KEEP": False}
    call = (x, *a.stride(), y, *g.stride(), *written, t, d, p)
    return lambda: tuned[(n * programs,)](*call, **compiled), partial


def error(kernel: str, a: Tensor, g: Tensor, factors: Tensor, out: Tensor) -> float:
    """Return the relative error of an output against float64, the largest of its numbers; NaN stays."""
    if kernel == "sum":
        wanted = torch.zeros(g.shape[2], a.shape[2], dtype=torch.float64, device=a.device)
        for x, y, factor in zip(a, g, factors, strict=True):
            wanted += float(factor) * (y.double().T @ x.double())
        return float((out.double().sum(0) - wanted).norm() / wanted.norm())
    squares = torch.stack([(y.double().T @ x.double()).square().sum() for x, y in zip(a, g, strict=True)])
    return float(((out[0].double().sum(1) - squares) / squares).abs().max())


def tried(
    kernel: str, dtype: str, shape: Shape, how: Candidate, seed: int, device: str, bench: Bench
) -> dict[str, Any]:
    """Return a row: the candidate's time and error, or why it cannot run."""
    a, g, factors = draw(shape, DTYPES[dtype], seed, device)
    row = {"shape": asdict(shape), **asdict(how), "current": is_current(how, kernel, shape, DTYPES[dtype])}
    try:
        call, out = prepared(kernel, shape, a, g, factors, how)
        call()
        off = error(kernel, a, g, factors, out)
        seconds = bench(call)
    except (TritonError, RuntimeError) as failure:  # too much shared memory, say
        return {**row, "status": "refused", "message": " ".join(str(failure).split())[:200]}
    return {**row, "status": "ok", "relative_error": off, "seconds": seconds}


def ceilings(dtype: str, bench: Bench) -> dict[str, float]:
    """Return bytes a second of a large copy, read and written, and FLOP a second of a large product."""
    source = torch.randn(SMALLEST_COPY // 4, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * SMALLEST_COPY / bench(lambda: target.copy_(source))
    x, y = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
    return {"bytes_a_second": copied, "flops_a_second": 2 * SQUARE**3 / bench(lambda: x @ y)}


def with_floor(row: dict[str, Any], kernel: str, element: int, most: dict[str, float]) -> dict[str, Any]:
    """Return a row with the least time that the ceilings allow, and the share of it that was reached."""
    if row["status"] != "ok":
        return row
    shape = Shape(**row["shape"])
    moving = num_bytes(kernel, shape, element) / most["bytes_a_second"]
    floor = max(flops(kernel, shape) / most["flops_a_second"], moving)
    return {**row, "floor_s": floor, "share_of_floor": floor / row["seconds"]}


def on_device(call: Callable[[], object]) -> float:
    """Return the median time (s) of a call on the GPU."""
    return float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")) / 1e3


def check(device: str = "cuda") -> float:
    """Run one small case of each kernel and return the largest error."""
    shape, worst = Shape(2, 40, 24, 72), 0.0
    for number, (kernel, dtype) in enumerate(KERNELS):
        a, g, factors = draw(shape, DTYPES[dtype], number, device)
        call, out = prepared(kernel, shape, a, g, factors, Candidate(16, 4, 3, 16))
        call()
        worst = max(worst, error(kernel, a, g, factors, out))
    return worst


def main(kernel: str, dtype: str, path: Path) -> None:
    """Try everything and write."""
    check_writable(path)
    most, rows = ceilings(dtype, on_device), []
    for seed, (shape, how) in enumerate(itertools.product(SHAPES[kernel], candidates(kernel, dtype))):
        row = tried(kernel, dtype, shape, how, seed, "cuda", on_device)
        rows.append(with_floor(row, kernel, DTYPES[dtype].itemsize, most))
    content = {"kernel": kernel, "dtype": dtype, "ceilings": most, "candidates": rows}
    write_text(path, record_of(capture("cuda"), **content))


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        sys.exit(0 if check() < 1e-3 else 1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
