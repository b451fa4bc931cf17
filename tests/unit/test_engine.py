"""What every engine refuses, restores and keeps, method by method."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach, bookkeeping
from dit_dp.clipping.batch import Batch, clip_factors
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import EngineStateError, LossShapeError, UnsupportedModelError, UsageError
from tests.models import groups_of, make_case

PRIVATE = [name for name, method in METHODS.items() if method.private]
OURS = [name for name in PRIVATE if not METHODS[name].peer]
ALL = list(METHODS)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda losses: losses[:, None],
        lambda losses: losses[None],
        lambda losses: losses.sum(),
        lambda losses: losses[1:],
    ],
    ids=["column", "row", "scalar", "short"],
)
def test_only_one_loss_per_example_is_accepted(method: str, wrong: Callable[[Tensor], Tensor]) -> None:
    case = make_case("vectors")
    engine = attach(case.model, method)
    wanted = r"shape \(1,\)" if METHODS[method].owns_forward else r"shape \(4,\)"
    with pytest.raises(LossShapeError, match=wanted):
        engine.accumulate(lambda model, batch: wrong(case.loss_fn(model, batch)), case.batch)


def test_a_column_of_losses_would_have_broken_the_guarantee() -> None:
    """The trap itself: factors (N,) times losses (N, 1) weigh each example by everybody's factors."""
    norms = torch.tensor([100.0, 0.01, 0.01, 0.01])
    weights = (clip_factors(norms, 1.0) * torch.ones(4, 1)).sum(1)
    assert float(weights[0] * norms[0]) > 300  # contribution of an example whose bound is 1


@pytest.mark.parametrize("method", ALL)
def test_detach_restores_the_model(method: str) -> None:
    case = make_case("convs")
    before = copy.deepcopy(case.model)
    keys = [set(m.__dict__) for m in case.model.modules()]
    engine = attach(case.model, method)
    engine.accumulate(case.loss_fn, case.batch)
    engine.detach()
    assert [set(m.__dict__) for m in case.model.modules()] == keys
    for (name, p), q in zip(case.model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.grad is None
        assert p.__dict__ == {}, name
    for module in case.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    losses = case.loss_fn(case.model, case.batch)
    losses.sum().backward()


@pytest.mark.parametrize("method", ALL)
def test_steps_out_of_order_are_refused(method: str) -> None:
    case = make_case("vectors")
    engine = attach(case.model, method)
    sigma = 1.0 if METHODS[method].private else 0.0
    with pytest.raises(EngineStateError, match="nothing was accumulated"):
        engine.privatize(noise_multiplier=sigma, expected_batch_size=4)
    engine.accumulate(case.loss_fn, case.batch)
    engine.privatize(noise_multiplier=sigma, expected_batch_size=4)
    with pytest.raises(EngineStateError, match="nothing was accumulated"):
        engine.privatize(noise_multiplier=sigma, expected_batch_size=4)
    with pytest.raises(EngineStateError, match="was not cleared"):
        engine.accumulate(case.loss_fn, case.batch)
    engine.zero_grad()
    engine.accumulate(case.loss_fn, case.batch)


@pytest.mark.parametrize("method", ALL)
def test_a_gradient_from_outside_is_refused(method: str) -> None:
    case = make_case("vectors")
    engine = attach(case.model, method)
    next(case.model.parameters()).grad = torch.ones(5, 6)
    with pytest.raises(EngineStateError, match="outside"):
        engine.accumulate(case.loss_fn, case.batch)


@pytest.mark.parametrize("method", ALL)
def test_two_engines_are_refused(method: str) -> None:
    case = make_case("vectors")
    attach(case.model, method)
    with pytest.raises(EngineStateError, match="another engine"):
        attach(case.model, "ghost")


@pytest.mark.parametrize("method", PRIVATE)
def test_virtual_steps_add_up(method: str) -> None:
    case = make_case("tokens", num_examples=6)
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 0.5, groups=groups_of(case.model, method))
    engine = attach(case.model, method, max_grad_norm=0.5)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        engine.accumulate(case.loss_fn, tuple(t[rows] for t in case.batch))  # type: ignore[union-attr]
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_vanilla_gives_the_mean_gradient_also_over_virtual_steps() -> None:
    case = make_case("tokens", num_examples=6)
    case.loss_fn(case.model, case.batch).mean().backward()
    wanted = {name: p.grad for name, p in case.model.named_parameters()}
    case.model.zero_grad()
    engine = attach(case.model, "vanilla")
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        assert engine.accumulate(case.loss_fn, tuple(t[rows] for t in case.batch)) is None  # type: ignore[union-attr]
    engine.privatize(noise_multiplier=0.0, expected_batch_size=6)
    for name, parameter in engine.parameters.items():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_vanilla_refuses_noise() -> None:
    case = make_case("vectors")
    engine = attach(case.model, "vanilla")
    engine.accumulate(case.loss_fn, case.batch)
    with pytest.raises(UsageError, match="noise_multiplier"):
        engine.privatize(noise_multiplier=1.0, expected_batch_size=4)


@pytest.mark.parametrize("method", PRIVATE)
def test_an_empty_batch_releases_noise(method: str) -> None:
    case = make_case("vectors", num_examples=0)
    engine = attach(case.model, method, max_grad_norm=2.0)
    norms = engine.accumulate(case.loss_fn, case.batch)
    assert norms is not None
    assert norms.shape == (0,)
    engine.privatize(noise_multiplier=3.0, expected_batch_size=4, generator=torch.Generator().manual_seed(0))
    noise = torch.cat([p.grad.flatten() for p in engine.parameters.values() if p.grad is not None])
    assert noise.numel() == sum(p.numel() for p in engine.parameters.values())
    assert 0.5 < float(noise.std()) / (3.0 * 2.0 / 4) < 1.5


@pytest.mark.parametrize("method", PRIVATE)
def test_noise_has_the_scale_of_the_threshold_and_is_added_once(method: str) -> None:
    model = nn.Linear(200, 200)
    case = make_case("vectors")
    batch = (torch.randn(3, 200), torch.randn(3, 200))
    engine = attach(model, method, max_grad_norm=0.25)

    def noised(sigma: float) -> Tensor:
        engine.accumulate(case.loss_fn, batch)
        generator = torch.Generator().manual_seed(7)
        engine.privatize(noise_multiplier=sigma, expected_batch_size=8, generator=generator)
        assert model.weight.grad is not None
        result = model.weight.grad.clone()
        engine.zero_grad()
        return result

    noise = noised(4.0) - noised(0.0)
    # 40,000 draws: the sample standard deviation is within 2 % (5.6 of its own standard errors).
    assert math.isclose(float(noise.std()), 4.0 * 0.25 / 8, rel_tol=0.02)


def test_own_noise_is_not_repeated() -> None:
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        case = make_case("vectors", num_examples=0)
        engine = attach(case.model, "ghost")
        engine.accumulate(case.loss_fn, case.batch)
        engine.privatize(noise_multiplier=1.0, expected_batch_size=1)
        grads.append(next(iter(engine.parameters.values())).grad)
    assert not torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", PRIVATE)
def test_backward_is_accumulate_for_a_forward_the_caller_ran(method: str) -> None:
    case = make_case("tokens")
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 0.5, groups=groups_of(case.model, method))
    engine = attach(case.model, method, max_grad_norm=0.5)
    if METHODS[method].owns_forward:
        with pytest.raises(EngineStateError, match=f"{method} runs the forward itself"):
            engine.backward(case.loss_fn(engine.forward_model, case.batch))
        return
    engine.backward(case.loss_fn(engine.forward_model, case.batch))
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-6)


class Coupled(nn.Module):
    """A layer, and something between the examples of a batch."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(6, 6), nn.Linear(6, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(torch.tanh(self.first(x)))).mean(1)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: x + 1e-6 * x.roll(1, 0),
        lambda x: x + torch.cumsum(x, 0).detach() * x,
        lambda x: x.flatten(0, 1).softmax(0).view_as(x),
    ],
    ids=["batch mean", "neighbour", "those before", "softmax over the batch"],
)
@pytest.mark.parametrize("method", [m for m in OURS if not METHODS[m].owns_forward])
def test_examples_that_are_not_kept_apart_are_found(method: str, mix: Callable[[Tensor], Tensor]) -> None:
    case = make_case("tokens")
    with pytest.raises(UnsupportedModelError, match="no per-example gradient exists"):
        attach(Coupled(mix), method).accumulate(case.loss_fn, case.batch)


def test_rounding_that_goes_by_memory_alignment_is_not_taken_for_coupling() -> None:
    for first in range(8):
        torch.manual_seed(first)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        case = make_case("vectors", num_examples=12)
        attach(model, "ghost").accumulate(case.loss_fn, tuple(t[first:] for t in case.batch))  # type: ignore[union-attr]


def test_a_loss_that_knows_one_batch_size_only_is_refused() -> None:
    case = make_case("tokens")

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return case.loss_fn(model, batch).view(2, 2).flatten()

    with pytest.raises(LossShapeError, match=r"fails on some of 4 units.*any number of units"):
        attach(case.model, "ghost").accumulate(loss_fn, case.batch)


def test_losses_are_back_propagated_once_and_with_a_graph() -> None:
    case = make_case("tokens")
    engine = attach(case.model, "bookkeeping")
    losses = case.loss_fn(engine.forward_model, case.batch)
    engine.backward(losses)
    with pytest.raises(EngineStateError, match="run the forward again"):
        engine.backward(losses)
    engine.zero_grad()
    with pytest.raises(LossShapeError, match="with a graph"):
        engine.backward(losses.detach())


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("method", ["bookkeeping", "flash_clip_bk", "lean", "auto"])
def test_sums_that_wait_for_a_gpu_are_the_same(method: str, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sums, dropped = [], []
    for waits in (False, True):
        case = make_case("tokens")
        weights = torch.ones(4)
        weights[0] = float("nan") if broken else 1.0
        pretended = SimpleNamespace(is_cuda=lambda tensor, waits=waits: waits)
        monkeypatch.setattr(bookkeeping, "hardware", lambda pretended=pretended: pretended)
        engine = attach(case.model, method, max_grad_norm=0.1)
        for _ in range(2):
            engine.accumulate(
                lambda model, given, case=case: case.loss_fn(model, given[:-1]) * given[-1], (*case.batch, weights)
            )
        sums.append([p.grad.clone() for p in engine.parameters.values() if p.grad is not None])
        dropped.append(engine.num_dropped)
    assert dropped[0] == dropped[1] == 2 * broken
    assert all(torch.equal(*pair) for pair in zip(*sums, strict=True))


@pytest.mark.parametrize("method", ["ghost", "bookkeeping", "flash_clip_bk"])
def test_gradients_of_zeros_laid_out_as_the_weight_is(method: str) -> None:
    """An empty batch comes first; the sum that follows does not take another layout for granted."""
    sums = []
    for batches in ([4], [0, 4]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.Linear(16, 5)).to(
            memory_format=torch.channels_last
        )
        model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
        x = torch.randn(4, 3, 4, 4)
        engine = attach(model, method, max_grad_norm=0.1)
        for size in batches:
            engine.accumulate(lambda m, b: m(b[0]).square().mean(1), (x[:size],))
        sums.append([p.grad.clone() for p in engine.parameters.values() if p.grad is not None])
    for pair in zip(*sums, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("method", OURS)
def test_ours_drop_a_non_finite_example_and_keep_weights_finite(method: str, value: float) -> None:
    case = make_case("tokens")
    x, target = case.batch  # type: ignore[misc]
    x = x.clone()
    x[1, 2, 3] = value
    wanted, _ = clipped_sum(case.model, case.loss_fn, (x, target), 0.5, groups=groups_of(case.model, method))
    engine = attach(case.model, method, max_grad_norm=0.5)
    norms = engine.accumulate(case.loss_fn, (x, target))
    assert norms is not None
    assert not torch.isfinite(norms[1])
    assert engine.num_dropped == 1
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-6)


class Reader(nn.Module):
    """A layer whose weight is read past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight.T


WATCHED = ["ghost", "bookkeeping", "flash_clip", "flash_clip_bk"]


@pytest.mark.parametrize("method", WATCHED)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), "layer 1: it mixes the examples"),
        (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False)), "GroupNorm"),
        (nn.Sequential(nn.Bilinear(6, 6, 3)), "no rule for Bilinear"),
        (nn.Sequential(nn.Conv2d(3, 3, 2, padding_mode="circular")), "padding_mode"),
        (nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)), "max_norm"),
    ],
    ids=["batchnorm", "batchnorm-plain", "bilinear", "padding", "max-norm"],
)
def test_ours_name_the_layer_they_cannot_run_on(method: str, model: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        attach(model, method)


OPACUS = [name for name, method in METHODS.items() if method.peer]


@pytest.mark.parametrize("method", OPACUS)
def test_peers_refuse_layers_that_mix_examples(method: str) -> None:
    """Opacus itself accepts BatchNorm without parameters of its own, and returns a wrong sum."""
    model = nn.Sequential(nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3, affine=False))
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        attach(model, method)


class Flattened(nn.Module):
    """Tokens moved into the batch: a per-row gradient is per token, not per example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).view(x.shape[0], x.shape[1], 3).mean(1)


@pytest.mark.parametrize("method", [m for m in PRIVATE if m not in ("opacus-ew", "microbatch")])
def test_tokens_flattened_into_the_batch_are_refused(method: str) -> None:
    engine = attach(Flattened(), method)
    with pytest.raises(UnsupportedModelError, match=r"\b20\b"):
        engine.accumulate(make_case("vectors").loss_fn, (torch.randn(4, 5, 6), torch.randn(4, 3)))


def test_opacus_ghost_refuses_ties_and_unused_parameters() -> None:
    with pytest.raises(UnsupportedModelError, match=r"logits\.weight: it is tied to words\.weight"):
        attach(make_case("reused").model, "opacus-ghost")
    model = nn.Linear(6, 3)
    model.unused = nn.Linear(2, 2)  # type: ignore[assignment]
    engine = attach(model, "opacus-ghost")
    with pytest.raises(UnsupportedModelError, match=r"no per-example gradient for unused\.weight"):
        engine.accumulate(make_case("vectors").loss_fn, make_case("vectors").batch)


@pytest.mark.parametrize("method", [m for m in PRIVATE if m != "microbatch"])
@pytest.mark.parametrize("lowered", [False, True])
def test_a_weight_read_past_its_layer_is_refused(method: str, lowered: bool) -> None:
    if lowered and not METHODS[method].supports_autocast:
        return
    engine = attach(Reader(), method)
    batch = (torch.randn(4, 6), torch.randn(4, 3))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            return make_case("vectors").loss_fn(model, batch)

    with pytest.raises(UnsupportedModelError, match=r"layer\.weight is used outside|xpanded Weights"):
        engine.accumulate(loss_fn, batch)


def test_a_failed_call_makes_the_sum_unusable() -> None:
    case = make_case("vectors")
    engine = attach(case.model, "ghost")
    engine.accumulate(case.loss_fn, case.batch)

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        case.loss_fn(model, batch)
        raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        engine.accumulate(failing, case.batch)
    with pytest.raises(EngineStateError, match="failed half way"):
        engine.privatize(noise_multiplier=1.0, expected_batch_size=4)
    with pytest.raises(EngineStateError, match="failed half way"):
        engine.accumulate(case.loss_fn, case.batch)
    engine.zero_grad()
    engine.accumulate(case.loss_fn, case.batch)


@pytest.mark.parametrize("method", PRIVATE)
def test_a_step_after_a_failed_one_is_exact(method: str) -> None:
    case = make_case("tokens")
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 0.5, groups=groups_of(case.model, method))
    engine = attach(case.model, method, max_grad_norm=0.5)
    with pytest.raises(LossShapeError):
        engine.accumulate(lambda model, batch: case.loss_fn(model, batch)[:, None], case.batch)
    engine.zero_grad()
    engine.accumulate(case.loss_fn, case.batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_the_oracle_refuses_a_model_with_an_engine() -> None:
    case = make_case("vectors")
    attach(case.model, "ghost")
    with pytest.raises(EngineStateError, match="plain model"):
        clipped_sum(case.model, case.loss_fn, case.batch, 1.0)


@pytest.mark.parametrize("method", WATCHED)
def test_ours_notice_a_leading_dimension_that_is_not_examples(method: str) -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1).mean(1)

    engine = attach(Swapped(), method)
    with pytest.raises(UnsupportedModelError, match="first dimension is 5"):
        engine.accumulate(make_case("vectors").loss_fn, (torch.randn(4, 5, 6), torch.randn(4, 3)))


@pytest.mark.parametrize("method", ALL)
def test_a_model_changed_after_attach_is_refused(method: str) -> None:
    case = make_case("vectors")
    engine = attach(case.model, method)
    first = next(case.model.parameters())
    first.requires_grad_(False)
    with pytest.raises(EngineStateError, match=r"frozen or unfrozen after attach"):
        engine.accumulate(case.loss_fn, case.batch)
    first.requires_grad_(True)
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.model.load_state_dict(state, assign=True)
    with pytest.raises(EngineStateError, match="replaced after attach"):
        engine.accumulate(case.loss_fn, case.batch)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_threshold_is_checked(threshold: float) -> None:
    with pytest.raises(UsageError, match="max_grad_norm"):
        attach(nn.Linear(2, 2), "ghost", max_grad_norm=threshold)


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(UsageError, match="vanilla, "):
        attach(nn.Linear(2, 2), "ghots")


def test_phases_are_announced_in_order() -> None:
    for method in ALL:
        seen: list[str] = []
        case = make_case("vectors")
        engine = attach(case.model, method, on_phase=seen.append)
        engine.accumulate(case.loss_fn, case.batch)
        engine.privatize(noise_multiplier=float(METHODS[method].private), expected_batch_size=4)
        wanted = ["forward", "backward", "clip", "noise"] if METHODS[method].private else ["forward", "backward"]
        if METHODS[method].owns_forward:
            assert seen == wanted[:3] * 4 + wanted[3:]
        else:
            assert seen == wanted, method
