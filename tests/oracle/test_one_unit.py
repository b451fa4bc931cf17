"""`auto` with one unit at a time: layers that are left to autograd, against the oracle, and those that must not be."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_dp.clipping import attach
from dit_dp.clipping.auto import AutoEngine
from dit_dp.clipping.batch import Batch, LossFn
from dit_dp.clipping.reference import clipped_sum
from dit_dp.clipping.watched import WatchedLayer
from dit_dp.errors import UnsupportedModelError
from tests.models import KINDS, Tokens, make_case
from tests.oracle.test_methods import median_norm, relative_error
from tests.oracle.test_units import MAPS, sets, sets_loss


def one_at_a_time(
    model: nn.Module, loss_fn: LossFn, batch: Batch, threshold: float, row_to_unit: Tensor | None = None
) -> AutoEngine:
    """Return an engine whose plan is one unit at a time, every weight's gradient kept."""
    engine = attach(model, "auto", threshold)
    assert isinstance(engine, AutoEngine)
    engine.accumulate(loss_fn, batch, row_to_unit)
    engine.zero_grad()
    assert engine.plan is not None
    engine.follow(replace(engine.plan, physical_batch=1, keep=frozenset(engine.plan.norms)))
    return engine


def watch(monkeypatch: pytest.MonkeyPatch, engine: AutoEngine) -> list[str]:
    """Return the names of layers whose calls the engine observes from now on."""
    seen: list[str] = []
    observe = engine.observe

    def noting(layer: WatchedLayer, x: Tensor, g: Tensor) -> None:
        seen.append(layer.name)
        observe(layer, x, g)

    monkeypatch.setattr(engine, "observe", noting)
    return seen


def error_of(engine: AutoEngine, wanted: dict[str, Tensor]) -> float:
    return relative_error({name: p.grad for name, p in engine.parameters.items()}, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_oracles(kind: str) -> None:
    case = make_case(kind)
    threshold = median_norm(case)
    wanted, wanted_norms = clipped_sum(case.model, case.loss_fn, case.batch, threshold)
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, threshold)
    for _ in range(2):  # added to what is there
        norms = engine.accumulate(case.loss_fn, case.batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=2)
    assert norms is not None
    torch.testing.assert_close(norms.double(), wanted_norms, rtol=1e-5, atol=0)
    assert error_of(engine, wanted) < 1e-5
    assert engine.plan is not None
    assert engine.choices()["norm_rules"].get("keep", 0) == len(engine.plan.keep)


@pytest.mark.parametrize("map_name", MAPS)
def test_units_of_several_rows(map_name: str) -> None:
    model, batch = sets(map_name)
    ids = MAPS[map_name]
    wanted, _ = clipped_sum(model, sets_loss, batch, 1.0, row_to_unit=ids)
    engine = one_at_a_time(model, sets_loss, batch, 1.0, ids)
    engine.accumulate(sets_loss, batch, ids)
    assert error_of(engine, wanted) < 1e-5


@pytest.mark.parametrize(
    ("kind", "watched"),
    [
        ("tokens", {"head"}),  # T = 1
        ("convs", {"norm", "grouped"}),  # of groups, gradients themselves
        ("reused", {"words", "logits"}),  # tied; the layer that is called three times is nobody else's
        ("blocks", {"chain.1.up", "chain.2.up", *(f"chain.{index}.gate" for index in range(4))}),
    ],
)
def test_kept_weights_of_one_layer_are_left_to_autograd(
    monkeypatch: pytest.MonkeyPatch, kind: str, watched: set[str]
) -> None:
    case = make_case(kind)
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, 1.0)
    seen = watch(monkeypatch, engine)
    engine.accumulate(case.loss_fn, case.batch)
    assert set(seen) == watched


def test_other_plans_leave_nothing_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("blocks")
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 1.0)
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, 1.0)
    assert engine.plan is not None
    blocks, norms = len(engine.blocks), engine.plan.norms
    changes: Sequence[dict[str, object]] = [
        {"physical_batch": 2},
        {"keep": frozenset(), "norms": dict.fromkeys(norms, "ghost")},
        {"booked": blocks - 1},
        {"stored": blocks - 1},
    ]
    layers = {name for name, module in case.model.named_modules() if isinstance(module, nn.Linear)}
    plan = engine.plan
    seen = watch(monkeypatch, engine)
    for change in changes:
        engine.follow(replace(plan, **change))  # type: ignore[arg-type]
        seen.clear()
        engine.accumulate(case.loss_fn, case.batch)
        assert set(seen) == layers
        assert error_of(engine, wanted) < 1e-5
        engine.zero_grad()


def test_a_parameter_with_a_hook_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else may be handed a gradient that is neither clipped nor noised."""
    case = make_case("tokens")
    assert isinstance(case.model, Tokens)
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, 1.0)
    seen = watch(monkeypatch, engine)
    heard: list[Tensor | None] = []
    case.model.narrow.weight.register_post_accumulate_grad_hook(lambda parameter: heard.append(parameter.grad))
    case.model.wide.bias.register_hook(heard.append)
    engine.accumulate(case.loss_fn, case.batch)
    assert set(seen) == {"wide", "narrow", "head"}
    assert all(gradient is None for gradient in heard)


def test_weights_are_watched_where_autograd_may_multiply_in_less_than_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("tokens")
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, 1.0)
    seen = watch(monkeypatch, engine)
    products: Any = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        engine.accumulate(case.loss_fn, case.batch)
    finally:
        products.fp32_precision = before
    assert set(seen) == {"wide", "narrow", "head"}
    engine.accumulate(case.loss_fn, case.batch)
    assert seen[3 * case.batch[0].shape[0] :] == ["head"] * case.batch[0].shape[0]


def test_half_precision_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("tokens")

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss_fn(model, batch)

    engine = one_at_a_time(case.model, loss_fn, case.batch, 1.0)
    seen = watch(monkeypatch, engine)
    engine.accumulate(loss_fn, case.batch)
    assert set(seen) == {"wide", "narrow", "head"}


def test_a_forward_of_the_callers_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("tokens")
    one = tuple(tensor[:1] for tensor in case.batch)
    wanted, _ = clipped_sum(case.model, case.loss_fn, one, 1.0)
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, 1.0)
    seen = watch(monkeypatch, engine)
    engine.accumulate(case.loss_fn, one)
    engine.zero_grad()
    seen.clear()
    engine.backward(case.loss_fn(engine.forward_model, one))
    assert set(seen) == {"wide", "narrow", "head"}
    assert error_of(engine, wanted) < 1e-5


def test_units_that_are_not_finite_are_dropped() -> None:
    case = make_case("tokens")
    x, target = case.batch
    bad = x.clone()
    bad[1], bad[2, 0, 0] = float("nan"), 1e30
    wanted, _ = clipped_sum(case.model, case.loss_fn, (bad, target), 1.0)
    engine = one_at_a_time(case.model, case.loss_fn, case.batch, 1.0)
    engine.accumulate(case.loss_fn, (bad, target))
    assert engine.num_dropped == 2
    assert error_of(engine, wanted) < 1e-5


class _ReadElsewhere(nn.Module):
    """A weight that its layer multiplies by, and a function does too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight).sum((1, 2))


def test_a_weight_that_is_read_elsewhere_is_refused_of_several_units_and_exact_of_one() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch, tuple)
        losses: Tensor = model(*batch)
        return losses

    torch.manual_seed(0)
    model, batch = _ReadElsewhere(), (torch.randn(3, 5, 6),)
    wanted, _ = clipped_sum(model, loss_fn, batch, 1.0)
    engine = attach(model, "auto")
    assert isinstance(engine, AutoEngine)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"layer\.weight is used outside its layer's forward"):
            engine.accumulate(loss_fn, batch)
        engine.zero_grad()
    assert engine.plan is not None
    engine.follow(replace(engine.plan, physical_batch=1, keep=frozenset(engine.plan.norms)))
    engine.accumulate(loss_fn, batch)
    assert error_of(engine, wanted) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    case = make_case("tokens")
    assert isinstance(case.model, Tokens)
    wide: Callable[[Tensor], Tensor] = case.model.wide

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Tokens)
        x, target = batch
        hidden = checkpoint(lambda t: F.gelu(wide(t)), x.detach().requires_grad_(), use_reentrant=reentrant)
        return (model.head(model.narrow(hidden).mean(1)) - target).square().mean(1)

    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 1.0)
    engine = one_at_a_time(case.model, loss_fn, case.batch, 1.0)
    engine.accumulate(loss_fn, case.batch)
    assert error_of(engine, wanted) < 1e-5
