"""Every model x every method of ours against the float64 loop: none is refused, all are exact. Peers where they run."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import UsageError
from dit_dp.models import DualStreamDiT, SetDiT
from tests.models import groups_of
from tests.samples import sampled
from tests.workload_models import CASES, REFUSED, build, draw

OURS = [name for name, method in METHODS.items() if method.private and not method.peer]
PEERS = [name for name, method in METHODS.items() if method.peer]
FROZEN = {
    "x2": ("x2", "head"),
    "x2 averaged": ("x2", "head"),
    "set film": ("encoder",),
    "set variational": ("encoder",),
}
"""What trains while the rest is frozen."""


def freeze(model: nn.Module, name: str) -> nn.Module:
    """Leave only the case's groups trainable."""
    assert isinstance(model, DualStreamDiT | SetDiT)
    kept = {parameter for group in FROZEN[name] for parameter in model.parameter_groups()[group]}
    for parameter, value in model.named_parameters():
        value.requires_grad_(parameter in kept)
    return model


@cache
def oracle(name: str, frozen: bool, layerwise: bool) -> tuple[float, dict[str, Tensor], Tensor]:
    """Return a threshold that clips about half of the units, the sum clipped by it and the norms."""
    objective, batch, units = draw(name)
    model = freeze(build(name), name) if frozen else build(name)
    _, norms = clipped_sum(model, objective, batch, 1.0, units)
    threshold = float(norms.median())
    groups = groups_of(model, "per_layer") if layerwise else None
    wanted, _ = clipped_sum(model, objective, batch, threshold, units, groups)
    return threshold, wanted, norms


def relative_error(got: dict[str, nn.Parameter], wanted: dict[str, Tensor]) -> float:
    """Return |got - wanted| / |wanted| over all parameters together."""
    off = sum(float((got[name].grad.double() - w).square().sum()) for name, w in wanted.items())  # type: ignore[union-attr]
    return (off / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


def check(method: str, name: str, *, frozen: bool = False, **options: bool) -> None:
    """Compare one method's clipped sum and norms with the oracle's."""
    threshold, wanted, norms = oracle(name, frozen, not METHODS[method].flat)
    objective, batch, units = draw(name)
    model = build(name, **options)
    engine = attach(freeze(model, name) if frozen else model, method, max_grad_norm=threshold)
    got = engine.accumulate(objective, batch, units)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    assert engine.parameters.keys() == wanted.keys()
    assert relative_error(engine.parameters, wanted) < 1e-5
    assert got is not None or method in PEERS  # whose hooks do not say the norms
    if got is not None:
        torch.testing.assert_close(got.double(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", OURS)
def test_clipped_sum_equals_the_oracle(method: str, name: str) -> None:
    check(method, name)


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("method", OURS)
def test_with_the_rest_frozen(method: str, name: str) -> None:
    check(method, name, frozen=True)


@pytest.mark.parametrize("name", ["x2", "ddt", "ddt plain", "set film", "panda"])
@pytest.mark.parametrize("method", PEERS)
def test_peers_are_exact_or_refuse_by_name(method: str, name: str) -> None:
    """Only DDT keeps to layers and one input; without RMSNorm every peer takes it."""
    refusal = None if name == "ddt plain" else REFUSED[name.partition(" ")[0]].get(method)
    if refusal is None:
        check(method, name)
        return
    with pytest.raises(UsageError, match=refusal):
        check(method, name)


@pytest.mark.parametrize("name", ["x2", "ddt", "set variational", "panda"])
@pytest.mark.parametrize("method", ["auto", "bookkeeping", "ghost", "lean"])
def test_with_activation_checkpointing(method: str, name: str) -> None:
    check(method, name, activation_checkpointing=True)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_exercised(name: str) -> None:
    """Nothing is compared with zero."""
    _, wanted, norms = oracle(name, frozen=False, layerwise=False)
    assert all(gradient.any() for gradient in wanted.values())
    assert float(norms.max()) > 1.5 * float(norms.min())


@cache
def unclipped(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the sum of a case's gradients and their norms, in float64."""
    objective, batch, units = draw(name)
    return clipped_sum(build(name), objective, batch, 1e9, units)


BF16 = [(method, name) for method in OURS for name in CASES]


@pytest.mark.parametrize(("method", "name"), sampled(BF16, 40))
def test_under_bf16_autocast(method: str, name: str) -> None:
    """Operands rounded to bf16 (relative 2^-9 each) leave sum and norms within a few per cent."""
    objective, batch, units = draw(name)
    wanted, norms = unclipped(name)
    engine = attach(build(name), method, max_grad_norm=1e9)

    def lowered(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return objective(model, batch)

    got = engine.accumulate(lowered, batch, units)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    assert relative_error(engine.parameters, wanted) < 0.05
    assert got is not None
    torch.testing.assert_close(got.double(), norms, rtol=0.05, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in engine.parameters.values())
