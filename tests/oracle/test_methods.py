"""Every method against the float64 per-example loop."""

import pytest
import torch

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.bookkeeping import SIDE_BY_SIDE
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.opacus import OpacusEngine
from dit_dp.clipping.reference import clipped_sum
from dit_dp.clipping.registry import engine_class
from dit_dp.errors import UnsupportedModelError
from tests import raw_models
from tests.models import KINDS, Case, groups_of, make_case

PRIVATE = [name for name, method in METHODS.items() if method.private]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

HOOKED = ("opacus", "opacus-functorch", "opacus-ghost")

REFUSED_BY_PEERS = {
    ("opacus", "padded"): "padding row",
    ("opacus-functorch", "padded"): "padding row",
    ("opacus-ghost", "padded"): "padding row",
    ("opacus-ghost", "reused"): "tied",
    ("opacus", "blocks"): "once for each name",
    ("opacus-functorch", "blocks"): "once for each name",
    ("opacus-ew", "blocks"): "once for each name",
    ("opacus-ghost", "blocks"): "once for each name",
    ("opacus-ew", "padded"): "padding row",
    ("opacus-ew", "words"): "no rule for RMSNorm",
    **{("opacus-ew", kind): "ExpandedWeights has no rule for" for kind in raw_models.KINDS},
    **{(peer, "adapters"): "buffers" for peer in HOOKED},
    **{(peer, kind): "inputs" for peer in HOOKED for kind in ("raw layers", "keywords")},
}
"""What a peer cannot run on, and a word of the reason it must give; everything else has to be exact."""


def median_norm(case: Case) -> float:
    """Return a threshold that clips about half of the examples."""
    _, norms = clipped_sum(case.model, case.loss_fn, case.batch, 1.0)
    return float(norms.median())


def attach_for_test(case: Case, method: str, threshold: float) -> Engine:
    """Attach a method, with norms reported where they cost extra."""
    extra = {"report_norms": True} if issubclass(engine_class(method), OpacusEngine) else {}
    return attach(case.model, method=method, max_grad_norm=threshold, **extra)


def relative_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return |got - wanted| / |wanted| over all parameters together."""
    difference = sum(float((got[name].double() - value).square().sum()) for name, value in wanted.items())
    size = sum(float(value.square().sum()) for value in wanted.values())
    return (difference / size) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", PRIVATE)
def test_clipped_sum_equals_the_oracle(method: str, kind: str, dtype: torch.dtype) -> None:
    case = make_case(kind)
    case = Case(
        case.model.to(dtype),
        tuple(t.to(dtype) if t.is_floating_point() else t for t in case.batch),
        case.loss_fn,
    )
    threshold = median_norm(case)
    groups = groups_of(case.model, method)
    wanted, wanted_norms = clipped_sum(case.model, case.loss_fn, case.batch, threshold, groups=groups)
    if (method, kind) in REFUSED_BY_PEERS:
        with pytest.raises(UnsupportedModelError, match=REFUSED_BY_PEERS[method, kind]):
            attach_for_test(case, method, threshold).accumulate(case.loss_fn, case.batch)
        return
    engine = attach_for_test(case, method, threshold)
    norms = engine.accumulate(case.loss_fn, case.batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    got = {name: p.grad for name, p in engine.parameters.items()}
    assert relative_error(got, wanted) < TOLERANCE[dtype]
    assert norms is not None
    torch.testing.assert_close(norms.double(), wanted_norms, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("limit", [1, 24, 60])
@pytest.mark.parametrize("kind", ["tokens", "scales", "blocks"])
@pytest.mark.parametrize("method", ["bookkeeping", "auto", "lean", "flash_clip_bk", "ghost_fsdp_bk"])
def test_vectors_side_by_side_are_exact_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch, method: str, kind: str, limit: int
) -> None:
    monkeypatch.setitem(SIDE_BY_SIDE, False, limit)
    case = make_case(kind)
    threshold = median_norm(case)
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, threshold)
    engine = attach_for_test(case, method, threshold)
    for _ in range(2):  # added to what is there
        engine.accumulate(case.loss_fn, case.batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=2)
    assert relative_error({name: p.grad for name, p in engine.parameters.items()}, wanted) < TOLERANCE[torch.float32]
