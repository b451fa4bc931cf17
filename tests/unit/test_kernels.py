"""The Triton kernels: what they compute, by Triton's interpreter; and that they compile, which needs no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is on Linux only")

HERE = Path(__file__).parent


def test_kernels_by_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(
    kernel: Any,
    element: str,
    tile: int,
    warps: int,
    layout: str = "pointers",
    *,
    whole: bool = False,
    block: int = 0,
) -> str:
    """Return the PTX of a kernel for sm_90, operands with contiguous features and sizes that 16 divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block = block or (32 if layout == "pointers" else 64)
    sides = (256, 128) if whole else (tile, tile)
    constants = {"a_feature": 1, "g_feature": 1, "TILE": tile, "BLOCK": block, "UPCAST": False, "WHOLE": whole}
    constants |= {
        "KEEP": True,
        "ADD": True,
        "A_LAYOUT": layout,
        "G_LAYOUT": layout,
        "ROWS": sides[0],
        "COLUMNS": sides[1],
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    a = g = f"*{element}"
    if layout != "pointers":
        gram = kernel.__name__ == "gram_kernel"
        tiles = [(tile, block)] * 2 if gram else [(block, side) for side in sides]
        g, a = (
            f"tensordesc<{element}{[1, *sizes] if layout == 'positions first' else [1, *sizes[::-1]]}>"
            for sizes in tiles
        )
    pointers = {"a": a, "g": g, "partial": "*fp32", "kept": "*fp32", "factors": "*fp32", "out": "*fp32"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in constants
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 3}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return ptx


def spilt_bytes(ptx: str, folder: Path) -> int:
    """Return the bytes of registers that ptxas writes to local memory for a H100."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", "-arch=sm_90a", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (found,) = re.findall(r"(\d+) bytes spill stores", said)
    return int(found)


@pytest.mark.parametrize("name", ["gram_kernel", "direct_kernel", "weighted_sum_kernel"])
@pytest.mark.parametrize(("element", "tile", "warps"), [("bf16", 128, 8), ("fp32", 64, 4), ("fp16", 16, 4)])
def test_kernels_compile_for_sm_90(
    name: str, element: str, tile: int, warps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_dp.clipping import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(getattr(kernels, name), element, tile, warps)
    assert "sm_90" in ptx
    assert "cp.async" in ptx or tile == 16  # fetched ahead
    assert "tf32" not in ptx  # float32 operands are multiplied as such
    assert spilt_bytes(ptx, tmp_path) == 0
    assert not re.search(r"\b(atom|red)\.", ptx)  # no addition whose order is left to chance
    assert ("wgmma" in ptx) == (element == "bf16")


@pytest.mark.parametrize("layout", ["positions first", "features first"])
@pytest.mark.parametrize("name", ["gram_kernel", "direct_kernel", "weighted_sum_kernel"])
def test_operands_are_fetched_by_descriptors_on_sm_90(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_dp.clipping import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(getattr(kernels, name), "bf16", 128, 8, layout)
    assert "cp.async.bulk.tensor" in ptx
    assert "wgmma" in ptx
    assert spilt_bytes(ptx, tmp_path) == 0


def test_clipped_sums_compile_as_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks nothing is spilt; two tiles of 256 x 128 are more than the registers hold, and faster all the same."""
    from dit_dp.clipping import kernels, launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for positions, most in ((256, 0), (1024, 1024)):
        tile = launch.sum_tile(positions, 1152, 4608)
        square = (tile.rows, tile.columns, tile.block) == (128, 128, 128)
        assert square or (tile.rows, tile.columns, tile.block, tile.whole) == (256, 128, 64, True)
        kernel = kernels.weighted_sum_kernel
        ptx = compiled(kernel, "bf16", 128, 8, "positions first", whole=tile.whole, block=tile.block)
        assert "wgmma" in ptx
        assert spilt_bytes(ptx, tmp_path) <= most
        assert not re.search(r"\b(atom|red)\.", ptx)
