"""The Triton kernels on the CPU, by Triton's interpreter; run by test_kernels.py in a process of its own.

Triton decides on import whether it interprets, so this module is collected only where it is named.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_dp.clipping import attach, contributions, kernel_calls, kernels, launch, tiled
from dit_dp.clipping.reference import clipped_sum
from memory_test.campaign import tune
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
    partial = launch.norm_partials(a, g, gram)
    got = partial[0].sum(1, dtype=torch.float64)
    torch.testing.assert_close(got, float64_squares(a, g), rtol=2e-6, atol=0)
    in_torch = (tiled.gram_squares if gram else tiled.direct_squares)(a, g)
    torch.testing.assert_close(got.float(), in_torch, rtol=4e-6, atol=0)


@pytest.mark.parametrize("positions", range(1, 12))
def test_every_pair_of_tiles_is_taken_once(positions: int) -> None:
    """The gradient is a sum of ones over tiles of one position each way: a pair missed or doubled shows."""
    a = torch.zeros(2, 16 * positions, 1)
    a[:, ::16] = 1
    pairs = positions * (positions + 1) // 2
    partial = torch.full((2, 2, pairs), float("nan"))
    kernel_calls.gram_partials(a, a, partial, tile=16)
    assert sorted(partial[0, 1].tolist()) == [1.0] * positions + [2.0] * (pairs - positions)
    assert torch.equal(partial[1], partial[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_count_by_their_absolute_values(dtype: torch.dtype) -> None:
    """Positions of alternating sign cancel; what they add up does not."""
    a = torch.ones(2, 150, 3, dtype=dtype)
    g = torch.where(torch.arange(150) % 2 == 0, 1.0, -1.0).to(dtype)[None, :, None].expand(2, 150, 5)
    squares, sizes = launch.norm_partials(a, g, True).sum(2)
    assert squares.tolist() == [0.0, 0.0]
    assert sizes.tolist() == [150 * 150 * 15.0] * 2


def test_launches_are_deterministic() -> None:
    a, g = operands(2, 140, 30, 40, torch.float32, 0, True)
    assert torch.equal(launch.norm_partials(a, g, True), launch.norm_partials(a, g, True))


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
def test_a_prediction_sees_the_operator_as_it_is(gram: bool) -> None:
    inputs = operands(2, 140, 30, 70, torch.float32, 0, True)
    torch.library.opcheck(launch.norm_partials, (*inputs, gram), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_gradients_come_with_their_norms(dtype: torch.dtype, strided: bool) -> None:
    a, g = operands(2, 40, 30, 150, dtype, 0, strided)
    kept, squares = contributions.Outer(a, g).kept(torch.Size((150, 30)))
    wanted = torch.bmm(g.double().transpose(1, 2), a.double())
    torch.testing.assert_close(kept.value.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), wanted.square().sum((1, 2)), rtol=1e-5, atol=0)
    torch.library.opcheck(launch.kept_gradients, (a, g), test_utils=("test_schema", "test_faketensor"))


def test_norms_are_finished_as_in_torch() -> None:
    partial = torch.rand(2, 6, 40) - 0.5
    partial[0, 1, 3], partial[0, 2, 5], partial[0, 3] = float("nan"), float("inf"), -1
    partial[1] = partial[0].abs()
    squares = launch.finished_norms(partial, 1e-3, 1e-4)
    wanted = contributions.not_below(partial[0].sum(1), partial[1].sum(1), 1e-3).clamp(min=0)
    torch.testing.assert_close(squares, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert squares[3] == 0
    alone = launch.finished_norms(partial[:1, 4:], 1e-3, 1e-4)
    torch.testing.assert_close(alone, partial[0, 4:].sum(1).clamp(min=0), rtol=1e-5, atol=1e-6)
    torch.library.opcheck(launch.finished_norms, (partial, 1e-3, 1e-4), test_utils=("test_schema", "test_faketensor"))


def test_what_a_descriptor_can_stand_for() -> None:
    x = torch.zeros(3, 16, 24, dtype=torch.bfloat16)
    assert kernel_calls.is_describable(x)
    assert kernel_calls.is_describable(x[:, :, 8:])
    assert not kernel_calls.is_describable(x[:, :, 4:]), "begins between multiples of 16 bytes"
    assert not kernel_calls.is_describable(x.transpose(1, 2))
    assert kernel_calls.handed(x.transpose(1, 2), 16, 16)[1] == "features first"
    assert not kernel_calls.is_describable(x[:, :1].expand(3, 16, 24)), "rows that are one row"
    assert kernel_calls.handed(x[:, :, 1:], 16, 16)[1] == "pointers"


def test_a_weight_that_is_not_contiguous_gets_its_own_gradient() -> None:
    """An empty batch first: gradients of zeros are laid out as the weight is, which the kernel must not add to."""
    torch.manual_seed(0)
    model = nn.Linear(24, 40, bias=False).bfloat16()
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    x, sums = torch.randn(1, 20, 24).bfloat16(), []
    for batches in ([x], [x[:0], x]):
        engine = attach(model, "ghost", max_grad_norm=0.1)
        for batch in batches:
            engine.accumulate(lambda m, b: m(b[0]).float().square().mean((1, 2)), (batch,))
        sums.append(next(iter(engine.parameters.values())).grad.clone())
        engine.zero_grad()
        engine.detach()
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("kernel", [kernels.gram_kernel, kernels.direct_kernel])
def test_the_tuner_changes_no_number(kernel: object) -> None:
    a, g = operands(1, 40, 20, 24, torch.float32, 0, False)
    results = []
    for depths in ((2,), (2, 3, 4)):
        gram = kernel is kernels.gram_kernel
        partial = torch.zeros(2, 1, 6) if gram else torch.zeros(1, 1, 4)
        launch = kernel_calls.tuned(kernel, 4, depths)
        launch[(partial[0].numel(),)](
            a, *a.stride(), g, *g.stride(), *[partial] * (1 if gram else 2), 40, 20, 24, TILE=16, BLOCK=16,
            A_LAYOUT="pointers", G_LAYOUT="pointers", UPCAST=False, **({} if gram else {"KEEP": False}),
        )  # fmt: skip
        results.append(partial)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0][0].sum(1).double(), float64_squares(a, g), rtol=1e-6, atol=0)


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


# --- clipped sums -------------------------------------------------------------------------------------------------


def float64_sum(a: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    """Return ``sum_i c_i g_i^T a_i``, (p, d); examples whose factor is 0 are left out."""
    kept = factors != 0
    return torch.einsum("n,ntp,ntd->pd", factors[kept].double(), g[kept].double(), a[kept].double())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of the dropped example
@pytest.mark.parametrize(
    ("programs", "long"), [(1, 512), (264, 512), (264, 100)], ids=["one group", "groups", "whole examples too"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=10, deadline=None)
@given(
    examples=st.integers(1, 5),
    positions=st.integers(1, 150),
    width=st.integers(1, 150),
    out_width=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    strided=st.booleans(),
    adds=st.booleans(),
)
def test_clipped_sum_equals_float64(
    dtype: torch.dtype,
    programs: int,
    long: int,
    examples: int,
    positions: int,
    width: int,
    out_width: int,
    seed: int,
    strided: bool,
    adds: bool,
) -> None:
    a, g = operands(examples, positions, width, out_width, dtype, seed, strided)
    factors = torch.rand(examples, generator=torch.Generator().manual_seed(seed))
    factors[seed % examples] = 0
    a[seed % examples], g[seed % examples] = float("inf"), float("nan")  # a dropped example may hold anything
    grad = torch.ones(out_width, width) if adds else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PROGRAMS", programs)
        patch.setattr(launch, "LONG", long)
        got = launch.weighted_sum(a, g, factors, grad)
    assert grad is None or got is grad
    torch.testing.assert_close(got.double(), float64_sum(a, g, factors) + (1 if adds else 0), rtol=2e-6, atol=0)


def aligned(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return nearly equal bf16 examples whose positions cancel to 1 / 500, and their clip factors for C = 1."""
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randn(2, 1, 32, 16, generator=generator)
    g[:, 16:], a[:, 16:] = -g[:, :16], a[:, :16] * (1 + 0.002 * torch.randn(1, 16, 16, generator=generator))
    a = (a + 0.001 * torch.randn(count, 32, 16, generator=generator)).bfloat16()
    g = g.expand(count, -1, -1).bfloat16()
    return a, g, 1 / (float64_squares(a, g).sqrt() + 1e-6).float()


@pytest.mark.parametrize(("programs", "long"), [(1, 512), (264, 512), (264, 32)], ids=["one group", "groups", "whole"])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_removing_one_of_many_aligned_examples_moves_the_sum_by_at_most_c(programs: int, long: int, seed: int) -> None:
    a, g, factors = aligned(seed, 48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PROGRAMS", programs)
        patch.setattr(launch, "LONG", long)
        everyone = launch.weighted_sum(a, g, factors, None)
        for gone in (0, 17, 47):
            rest = [i for i in range(48) if i != gone]
            moved = everyone - launch.weighted_sum(a[rest], g[rest], factors[rest], None)
            assert float(moved.norm()) <= 1 + 1e-4


def test_factors_rounded_into_an_operand_would_break_the_bound() -> None:
    """Why the kernel weighs products: the property above has the power to see the difference."""
    a, g, factors = aligned(0, 4)
    rounded = (a * factors[:, None, None]).bfloat16()
    moved = torch.bmm(g.double().transpose(1, 2), rounded.double()).flatten(1).norm(dim=1)
    assert float(moved.max()) > 1.01


def test_a_prediction_sees_the_sum_as_it_is() -> None:
    a, g = operands(3, 20, 30, 70, torch.bfloat16, 0, True)
    out = torch.zeros(2, 70, 30)
    torch.library.opcheck(
        launch.weighted_sums, (a, g, torch.rand(3), out, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("method", ["ghost", "bookkeeping", "per_layer", "flash_clip_bk"])
def test_engines_sum_bf16_by_the_kernel(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method on a model in bf16: by the kernel and by copies to float32 the sum is the same to rounding."""
    totals, seen = [], []
    weigh = launch.weighted_sum
    monkeypatch.setattr(contributions, "weighted_sum", lambda *given: seen.append(given[0].shape) or weigh(*given))
    for least in (launch.MIN_POSITIONS, 10_000):
        monkeypatch.setattr(launch, "MIN_POSITIONS", least)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).bfloat16()
        options = {"keep_up_to": 0.0} if method == "bookkeeping" else {}
        engine = attach(model, method, max_grad_norm=0.1, **options)
        batch = (torch.randn(4, 20, 6).bfloat16(),)
        engine.accumulate(lambda m, b: m(b[0]).float().square().mean((1, 2)), batch)
        totals.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]))
    assert len(seen) >= 2
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-7)


# --- the program that tries tiles, warps and depths ---------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "dtype"), tune.KERNELS)
def test_candidates_of_the_tuning_are_the_kernels_that_run(kernel: str, dtype: str) -> None:
    shape = tune.Shape(3, 20, 24, 40)
    for seed, tile in enumerate((16, 32)):
        row = tune.tried(kernel, dtype, shape, tune.Candidate(tile, 4, 3, 16), seed, "cpu", lambda call: 2.0)
        assert row["status"] == "ok", row
        assert row["relative_error"] < 5e-6
    most = {"bytes_a_second": 1e3, "flops_a_second": 1e9}
    assert tune.with_floor(row, kernel, 2, most)["share_of_floor"] == tune.num_bytes(kernel, shape, 2) / 1e3 / 2


def test_an_output_that_is_not_written_is_an_error_that_is_not_a_number() -> None:
    a, g, factors = tune.draw(tune.Shape(2, 20, 24, 40), torch.float32, 0, "cpu")
    _, out = tune.prepared("gram", tune.Shape(2, 20, 24, 40), a, g, factors, tune.Candidate(16, 4, 3, 16))
    assert tune.error("gram", a, g, factors, out) != tune.error("gram", a, g, factors, out)


def test_the_small_case_for_the_sanitizer_is_right_and_what_the_engine_compiles_is_among_the_candidates() -> None:
    assert tune.check("cpu") < 1e-5
    for kernel, dtype in tune.KERNELS:
        for shape in tune.SHAPES[kernel]:
            tried = [
                how for how in tune.candidates(kernel, dtype) if tune.is_current(how, kernel, shape, tune.DTYPES[dtype])
            ]
            assert tried, (kernel, dtype, shape)
