"""Every promise of every method of ours on random models: a seeded sample here, 500 cases in `make test-full`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from memory_test.doctor.args import OURS
from memory_test.doctor.examine import CHECKS, MODEL_CHECKS, examine_method, examine_model
from tests.sensitivity import record
from tests.sensitivity.generate import random_case
from tests.sensitivity.record import Tally

FIRST_SEED = 0
SAMPLE = 8
NUM_CASES, PART = 500, 20

KINDS = {
    *(f"Linear over {n} leading dimensions" for n in (1, 2, 3)),
    *(f"Conv2d, {kind}" for kind in ("plain", "grouped", "strided or dilated")),
    *(f"Embedding {kind}" for kind in ("by word", "by example", "with padding row", "tied to a Linear")),
    *(f"{norm}{affine}" for norm in ("LayerNorm", "RMSNorm", "GroupNorm") for affine in ("", " without affine")),
    *("Linear, not contiguous", "attention", "residual", "called more than once", "tied weights", "unused layer"),
    *("checkpoint reentrant", "checkpoint non-reentrant", "frozen parts", "bias-only training"),
    *("raw parameters", "units of several rows", "DiT"),
}
"""What the full run must meet."""


def tally(methods: tuple[str, ...], seeds: range) -> Tally:
    """Examine the methods on the cases of these seeds."""
    found = Tally()
    for seed in seeds:
        made = random_case(seed)
        found.kinds += made.kinds
        model, reference = examine_model(made.case)
        assert reference is not None, model.checks[-1].explanation
        found.add(seed, [model, *(examine_method(made.case, method, reference, seed) for method in methods)])
    return found


@pytest.mark.parametrize("method", OURS)
def test_a_sample_of_random_cases(method: str) -> None:
    seeds = range(FIRST_SEED, FIRST_SEED + SAMPLE)
    found = tally((method,), seeds)
    assert found.failures == [], f"random_case(seed), seeds {seeds.start} to {seeds.stop - 1}"
    assert set(found.margins[method]) == set(CHECKS)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + NUM_CASES, PART))
def test_all_random_cases(first: int, stated: Callable[[str, int], None], record_property: Any) -> None:
    """The stated count, in parts that workers share; `tests.full_record` puts them together, failures included."""
    stated("random models, each under every method of ours", PART)
    found = tally(OURS, range(first, first + PART))
    record_property("tally", {"num_cases": PART, "methods": OURS, "found": found.plain()})
    assert found.failures == []
    assert set(found.kinds) <= KINDS


@pytest.mark.skipif(not record.PATH.exists(), reason="no record committed yet; `make test-full` writes it")
def test_the_committed_record_covers_every_method_of_ours() -> None:
    committed = record.load(record.PATH)
    assert committed.schema_version == record.SCHEMA_VERSION
    assert committed.failures == ()
    assert committed.num_cases >= 500
    assert set(committed.methods) == set(OURS)
    assert set(committed.worst_margins) == {"model", *OURS}
    assert set(committed.worst_margins["model"]) == set(MODEL_CHECKS)
    for method in OURS:
        assert set(committed.worst_margins[method]) == set(CHECKS)
        assert all(margin <= 1 for margin in committed.worst_margins[method].values())
    assert set(committed.layer_kinds) == KINDS
    assert committed.environment["commit"]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = tally(("microbatch",), range(2)).record(0, 2, ("microbatch",))
    record.save(written, tmp_path / "new" / "record.json")
    assert record.load(tmp_path / "new" / "record.json") == written


def test_a_seed_gives_the_same_case() -> None:
    for seed in range(12):
        one, other = random_case(seed), random_case(seed)
        assert one.kinds == other.kinds
        with torch.no_grad():
            losses = [made.case.loss_fn(made.case.model, made.case.batch) for made in (one, other)]
        assert torch.equal(*losses)
        assert losses[0].shape == (one.case.num_units,)


class Recomputed(nn.Module):
    """One layer called twice inside a reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def twice(x: Tensor) -> Tensor:
            return self.shared(torch.tanh(self.shared(x)))

        result: Tensor = checkpoint(twice, self.first(x), use_reentrant=True)
        return result


def recomputed_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, target = batch  # type: ignore[misc]
    losses: Tensor = (model(x) - target).square().mean(1)
    return losses


@pytest.mark.parametrize("method", [m for m in OURS if METHODS[m].flat])
def test_two_calls_in_a_reentrant_checkpoint(method: str) -> None:
    torch.manual_seed(0)
    model, batch = Recomputed(), (torch.randn(4, 4), 10 * torch.randn(4, 4))
    _, wanted = clipped_sum(model, recomputed_loss, batch, 1.0)
    norms = attach(model, method).accumulate(recomputed_loss, batch)
    assert norms is not None
    torch.testing.assert_close(norms.double(), wanted, rtol=1e-5, atol=0)
