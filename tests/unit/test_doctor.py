"""The doctor finds what is wrong: engines that break one promise each, models that no method can be right on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn
from dit_dp.clipping.microbatch import MicrobatchEngine
from dit_dp.clipping.registry import METHODS, Method
from dit_dp.clipping.units import Units
from memory_test.doctor.case import Case, refer
from memory_test.doctor.examine import examine_attachment, examine_method, examine_model
from memory_test.doctor.facts import Check
from memory_test.doctor.model_checks import forward_coupling, gradient_coupling
from memory_test.doctor.noise import surprise
from tests.models import make_case


class TooMuch(MicrobatchEngine):
    """Clips to 1.01 C and adds noise for C."""

    def _finish(self, losses: Tensor) -> Tensor:
        threshold = self.max_grad_norm
        self.max_grad_norm *= 1.01
        norms = super()._finish(losses)
        self.max_grad_norm = threshold
        return norms


class Averaged(MicrobatchEngine):
    """Divides by the batch that was drawn, so that everybody's weight depends on everybody's presence."""

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor:
        norms = super()._accumulate(loss_fn, batch, units)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= units.num_units
        return norms


class FirstFavoured(MicrobatchEngine):
    """Counts the first example twice."""

    def _accumulate(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor:
        norms = super()._accumulate(loss_fn, batch, units)
        super()._accumulate(loss_fn, *units.take(batch, 0, 1))
        return norms


class Forgetful(MicrobatchEngine):
    """Loses one parameter's gradient."""

    def _privatize(self, *arguments: float | torch.Generator | None) -> None:
        next(iter(self.parameters.values())).grad = None
        super()._privatize(*arguments)  # type: ignore[arg-type]


class HalfNoised(MicrobatchEngine):
    """Adds no noise to one parameter."""

    def _privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: torch.Generator | None
    ) -> None:
        parameter = next(iter(self.parameters.values()))
        assert parameter.grad is not None
        clean = parameter.grad.clone()
        super()._privatize(noise_multiplier, expected_batch_size, generator)
        parameter.grad = clean


class Unscaled(MicrobatchEngine):
    """Adds noise of standard deviation sigma instead of sigma C."""

    def _privatize(
        self, noise_multiplier: float, expected_batch_size: float, generator: torch.Generator | None
    ) -> None:
        super()._privatize(noise_multiplier / self.max_grad_norm, expected_batch_size, generator)


class Trusting(MicrobatchEngine):
    """Adds a non-finite example times a factor of zero."""

    def _finish(self, losses: Tensor) -> Tensor:
        norms = super()._finish(losses)
        if not bool(torch.isfinite(norms)):
            for parameter in self.parameters.values():
                parameter.grad = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad) + 0 * norms
        return norms


class Uncounted(MicrobatchEngine):
    """Drops without counting."""

    def _finish(self, losses: Tensor) -> Tensor:
        norms = super()._finish(losses)
        self.num_dropped = 0
        return norms


class Busy(MicrobatchEngine):
    """Makes something of nothing."""

    def _accumulate_nothing(self) -> Tensor | None:
        norms = super()._accumulate_nothing()
        for parameter in self.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        return norms


class Untidy(MicrobatchEngine):
    """Changes a parameter when it is detached."""

    def _detach(self) -> None:
        with torch.no_grad():
            next(iter(self.parameters.values())).mul_(1 + 1e-6)


class Crashing(MicrobatchEngine):
    """Fails on a non-finite example."""

    def _finish(self, losses: Tensor) -> Tensor:
        norms = super()._finish(losses)
        if not bool(torch.isfinite(norms)):
            raise IndexError("no norm")
        return norms


BROKEN: dict[type[MicrobatchEngine], set[str]] = {
    TooMuch: {"exactness", "float64", "removal"},
    Averaged: {"exactness", "float64", "independence", "accumulation"},
    FirstFavoured: {"exactness", "float64", "removal", "order", "independence", "accumulation"},
    Forgetful: {"coverage", "exactness", "float64"},
    HalfNoised: {"noise"},
    Unscaled: {"noise"},
    Trusting: {"non-finite"},
    Uncounted: {"non-finite"},
    Busy: {"empty batch", "accumulation"},
    Untidy: {"restoration"},
    Crashing: {"non-finite"},
}
"""What a broken engine must fail; a promise broken elsewhere may show in more checks than its own."""


def diagnose(engine: type[MicrobatchEngine], monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """Return the findings on one engine by name."""
    monkeypatch.setitem(METHODS, "broken", Method(engine=f"{__name__}:{engine.__name__}", summary="a mistake"))
    case = make_case("tokens")
    return {check.name: check for check in examine_method(case, "broken", refer(case, 0.7)).checks}


@pytest.mark.parametrize("engine", BROKEN, ids=lambda engine: engine.__name__)
def test_a_broken_promise_is_found(engine: type[MicrobatchEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(engine, monkeypatch)
    failed = {name for name, check in found.items() if check.status == "failed"}
    assert failed >= BROKEN[engine]
    assert "noise" not in failed or engine in (HalfNoised, Unscaled, Forgetful)


def test_what_an_engine_raises_is_its_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    check = diagnose(Crashing, monkeypatch)["non-finite"]
    assert check.measured is None
    assert "IndexError: no norm" in check.explanation


class BatchMean(nn.Module):
    """Subtracts the batch's mean, with or without its gradient."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        mean = hidden.mean(0)
        return (hidden - (mean.detach() if self.detached else mean)).mean(1)


def token_case(model: nn.Module) -> Case:
    """Return a case of `make_case('tokens')` around another model."""
    case = make_case("tokens")
    return Case(model, case.batch, case.loss_fn)


@pytest.mark.parametrize(
    ("make", "failed"),
    [
        (lambda: BatchMean(detached=False), {"coupling"}),
        (lambda: BatchMean(detached=True), {"coupling"}),
        (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3), nn.Flatten(1), nn.Linear(15, 3)), {"determinism"}),
    ],
    ids=["batch mean", "detached batch mean", "dropout"],
)
def test_what_no_method_can_mend_is_found(make: Callable[[], nn.Module], failed: set[str]) -> None:
    model, _ = examine_model(token_case(make()))
    assert {check.name for check in model.checks if check.status == "failed"} >= failed


def test_a_leak_names_the_layer_and_the_example() -> None:
    leak = gradient_coupling(token_case(BatchMean(detached=False)), 1)
    assert leak.size > 0
    assert leak.where in ("layer layer by the loss of example 1", "batch[0] by the loss of example 1")
    assert gradient_coupling(token_case(BatchMean(detached=True)), 1).size == 0
    assert "when 1 changes" in forward_coupling(token_case(BatchMean(detached=True)), 1).where


def test_a_refusal_is_named_and_ends_the_examination() -> None:
    case = token_case(nn.Sequential(nn.Conv1d(5, 3, 6), nn.Flatten(1)))
    (check,) = examine_method(case, "ghost", refer(case)).checks
    assert check.status == "refused"
    assert "layer 0: no rule for Conv1d" in check.explanation


def test_batch_norm_has_no_reference_and_is_refused() -> None:
    case = token_case(nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(30), nn.Linear(30, 3)))
    model, reference = examine_model(case)
    assert reference is None
    assert {check.name for check in model.checks if check.status == "failed"} == {"coupling", "reference"}
    (check,) = examine_attachment(case, "microbatch").checks
    assert check.status == "refused"
    assert "mixes the examples" in check.explanation


def test_the_noise_test_knows_its_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 100, 40_000_000):
        z = torch.randn(size, generator=generator, dtype=torch.float64)
        assert surprise(z) < 3
    z = torch.randn(10_000, generator=generator, dtype=torch.float64)
    assert surprise(z * 1.05) > 6
    assert surprise(z / 1.05) > 6
    assert surprise(torch.zeros(1, dtype=torch.float64)) == float("inf")
    assert surprise(torch.full((3,), float("nan"), dtype=torch.float64)) == float("inf")
