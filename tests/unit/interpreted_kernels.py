"""The Triton kernels on the CPU, by Triton's interpreter; run by test_kernels.py in a process of its own.

Triton decides on import whether it interprets, so this module is collected only where it is named.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_dp.clipping import attach, kernels, tiled
from dit_dp.clipping.reference import clipped_sum
from tests.models import make_case
from tests.operands import float64_squares, operands

sizes = st.integers(1, 150)
shapes = given(
    examples=st.integers(1, 3),
    positions=sizes,
    width=sizes,
    out_width=sizes,
    seed=st.integers(0, 2**31),
    strided=st.booleans(),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
@settings(max_examples=10, deadline=None)
@shapes
def test_kernel_equals_float64_and_torch(
    gram: bool,
    dtype: torch.dtype,
    examples: int,
    positions: int,
    width: int,
    out_width: int,
    seed: int,
    strided: bool,
) -> None:
    a, g = operands(examples, positions, width, out_width, dtype, seed, strided)
    got = tiled.norm_partials(a, g, gram).sum(1, dtype=torch.float64)
    torch.testing.assert_close(got, float64_squares(a, g), rtol=2e-6, atol=0)
    in_torch = (tiled.gram_squares if gram else tiled.direct_squares)(a, g)
    torch.testing.assert_close(got.float(), in_torch, rtol=4e-6, atol=0)


@pytest.mark.parametrize("positions", range(1, 12))
def test_every_pair_of_tiles_is_taken_once(positions: int) -> None:
    """The gradient is a sum of ones over tiles of one position each way: a pair missed or doubled shows."""
    a = torch.zeros(2, 16 * positions, 1)
    a[:, ::16] = 1
    pairs = positions * (positions + 1) // 2
    partial = torch.full((2, pairs), float("nan"))
    kernels.gram_partials(a, a, partial, tile=16)
    assert sorted(partial[1].tolist()) == [1.0] * positions + [2.0] * (pairs - positions)


def test_launches_are_deterministic() -> None:
    a, g = operands(2, 140, 30, 40, torch.float32, 0, True)
    assert torch.equal(tiled.norm_partials(a, g, True), tiled.norm_partials(a, g, True))


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
def test_a_prediction_sees_the_operator_as_it_is(gram: bool) -> None:
    inputs = operands(2, 140, 30, 70, torch.float32, 0, True)
    torch.library.opcheck(tiled.norm_partials, (*inputs, gram), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kernel", [kernels.gram_kernel, kernels.direct_kernel])
def test_the_tuner_changes_no_number(kernel: object) -> None:
    a, g = operands(1, 40, 20, 24, torch.float32, 0, False)
    results = []
    for depths in ((2,), (2, 3, 4)):
        partial = torch.zeros(1, 6 if kernel is kernels.gram_kernel else 4)
        launch = kernels.tuned(kernel, 4, depths)
        launch[(partial.numel(),)](a, *a.stride(), g, *g.stride(), partial, 40, 20, 24, TILE=16, BLOCK=16, UPCAST=False)
        results.append(partial)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].sum(1).double(), float64_squares(a, g), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["tokens", "convs", "reused"])
@pytest.mark.parametrize("method", ["flash_clip", "flash_clip_bk"])
def test_engine_on_the_kernels_equals_the_oracle(method: str, kind: str) -> None:
    case = make_case(kind)
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 1.0)
    engine = attach(case.model, method, max_grad_norm=1.0)
    engine.accumulate(case.loss_fn, case.batch)
    assert engine.choices()["norm_kernels"] == ["triton"]
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        error = (parameter.grad.double() - wanted[name]).norm() / sum(w.norm() for w in wanted.values())
        assert error < 1e-5, name
