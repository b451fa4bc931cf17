"""Tile-fused norms in torch, and what surrounds the kernels; the kernels themselves are in test_kernels.py."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_dp import clipping
from dit_dp.clipping import attach, contributions, launch, tiled
from dit_dp.clipping.hardware import hardware
from dit_dp.errors import UsageError
from tests.models import make_case
from tests.operands import float64_squares, operands

ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float64: 1e-13}
"""Products of half precision are exact in float32. A sum of 300 terms of one sign, added one after the other where a
side is 1 wide, is off by sqrt(300) roundings of 2^-24 at random, its square by twice that: 2e-6, and room.
"""


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("squares", [tiled.gram_squares, tiled.direct_squares, tiled.squared_norms])
@settings(max_examples=20, deadline=None)
@given(
    examples=st.integers(1, 5),
    positions=st.one_of(st.integers(1, 40), st.integers(250, 300)),
    width=st.integers(1, 40),
    out_width=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    strided=st.booleans(),
)
def test_norms_equal_float64(
    squares: Any,
    dtype: torch.dtype,
    examples: int,
    positions: int,
    width: int,
    out_width: int,
    seed: int,
    strided: bool,
) -> None:
    a, g = operands(examples, positions, width, out_width, dtype, seed, strided)
    got = squares(a, g)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), float64_squares(a, g), rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("shape", [(3, 1100, 8, 12), (2, 40, 1500, 70)], ids=["positions", "features"])
@pytest.mark.parametrize("squares", [tiled.gram_squares, tiled.direct_squares])
def test_matrices_longer_than_a_tile_may_be(squares: Any, shape: tuple[int, int, int, int]) -> None:
    a, g = operands(*shape, torch.float32, seed=3, strided=False)
    assert max(shape) > tiled.SPAN
    torch.testing.assert_close(squares(a, g).double(), float64_squares(a, g), rtol=1e-6, atol=0)


class _LargestTensor(TorchDispatchMode):
    """Note the largest storage that an operator makes, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize(
    ("shape", "rule"), [((4, 1024, 48, 4000), "direct"), ((4, 600, 2000, 2000), "ghost")], ids=["direct", "ghost"]
)
def test_no_matrix_is_held(shape: tuple[int, int, int, int], rule: str) -> None:
    _, positions, width, out_width = shape
    assert tiled.norm_rule(positions, width, out_width) == rule
    a, g = operands(*shape, torch.float32, seed=0, strided=False)
    with _LargestTensor() as seen:
        tiled.squared_norms(a, g)
    assert 0 < seen.numbers <= tiled.SCRATCH < min(positions**2, width * out_width)


def test_the_rule_that_needs_fewer_operations() -> None:
    assert tiled.norm_rule(1, 10, 10) == "outer product"
    assert tiled.norm_rule(256, 1152, 4608) == "ghost"  # DiT-XL/2
    assert tiled.norm_rule(1024, 1152, 1152) == "ghost"
    assert tiled.norm_rule(1024, 384, 1536) == "direct"
    assert tiled.norm_rule(20, 20, 20) == "direct"  # a tie


def test_a_broken_example_breaks_no_other() -> None:
    for bad in (float("nan"), float("inf"), 1e30):
        for size in (8, 60):  # direct and ghost
            a, g = operands(3, 20, size, size, torch.float32, seed=1, strided=False)
            whole = tiled.squared_norms(a, g)
            a[1, 3] = bad
            broken = tiled.squared_norms(a, g)
            assert not torch.isfinite(broken[1])
            torch.testing.assert_close(broken[[0, 2]], whole[[0, 2]])


def test_what_tensor_cores_cut_off_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 was seen to lose 250 units of float32's epsilon at DiT-XL's widths, for which 728 are allowed."""
    epsilon = torch.finfo(torch.float32).eps
    a, g = torch.ones(2, 4, 1152), torch.ones(2, 4, 4608)
    assert contributions.lost_share(a, g) == contributions.GRAM_ROUNDING * epsilon
    monkeypatch.setattr(hardware(), "is_cuda", lambda tensor: True)
    assert contributions.lost_share(a, g) == contributions.GRAM_ROUNDING * epsilon, "float32 is multiplied as such"
    assert contributions.lost_share(a.bfloat16(), g.bfloat16()) == 728 * epsilon
    raised = contributions.not_below(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 100.0]), 728 * epsilon)
    assert raised.tolist() == [1.0, pytest.approx(1 + 72800 * epsilon)]


def test_norms_are_the_same_every_time() -> None:
    a, g = operands(3, 300, 70, 90, torch.float32, seed=2, strided=True)
    assert torch.equal(tiled.squared_norms(a, g), tiled.squared_norms(a, g))


@pytest.mark.parametrize("shape", [(4, 256, 1152, 4608), (4, 100, 40, 24)], ids=["ghost", "direct"])
def test_a_prediction_needs_no_device(shape: tuple[int, int, int, int]) -> None:
    examples, positions, width, out_width = shape
    for device in ("cuda", "cpu", "meta"):
        with FakeTensorMode():
            a = torch.empty(examples, positions, width, device=device, dtype=torch.bfloat16)
            squares = tiled.squared_norms(a, a.new_empty(examples, positions, out_width))
        assert (squares.shape, squares.dtype, squares.device.type) == ((examples,), torch.float32, device)


def test_tiles_follow_from_size_and_dtype() -> None:
    assert [launch.kernel_tile(size, torch.bfloat16) for size in (1, 16, 17, 100, 256)] == [16, 16, 32, 128, 128]
    assert [launch.kernel_tile(size, torch.float32) for size in (5, 64, 1024)] == [16, 64, 64]


def test_cuda_without_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dit_dp.clipping.kernel_calls", raising=False)
    monkeypatch.delattr(clipping, "kernel_calls", raising=False)
    a, g = operands(1, 4, 4, 4, torch.float32, seed=0, strided=False)
    with pytest.raises(UsageError, match="needs triton"):
        launch.norm_partials(a, g, True)


@pytest.mark.parametrize("method", ["flash_clip", "flash_clip_bk"])
def test_the_record_says_what_took_the_norms(method: str) -> None:
    case = make_case("tokens")
    engine = attach(case.model, method, max_grad_norm=1.0)
    engine.accumulate(case.loss_fn, case.batch)
    assert engine.choices() == {"norm_rules": {"direct": 1, "ghost": 1, "outer product": 1}, "norm_kernels": ["torch"]}
