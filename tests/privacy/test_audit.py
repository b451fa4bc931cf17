"""One-run privacy audit: what a trained model tells stays below what is claimed, unless something is broken."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dit_dp.privacy import Mechanism, epsilon
from tests.privacy.audit import Run, audit, lower_bound, p_value

DELTA = 1e-5
CLIP = 20.0
RUNS = [
    Run(noise_multiplier=1.5, max_grad_norm=CLIP, sample_rate=1.0, num_steps=1),
    Run(noise_multiplier=3.0, max_grad_norm=CLIP, sample_rate=1.0, num_steps=4),
    Run(noise_multiplier=4.0, max_grad_norm=CLIP, sample_rate=0.3, num_steps=20),
]
SEEDS = range(2)
FULL_SEEDS = range(40)


def claimed(run: Run) -> float:
    """What the accountant says of a run that is not broken."""
    return epsilon(
        Mechanism(noise_multiplier=run.noise_multiplier, sample_rate=run.sample_rate, num_steps=run.num_steps), DELTA
    )


def broken(run: Run) -> dict[str, Run]:
    """What an engine would have released that forgot something, by the one that does not."""
    huge = 100 * run.gradient_norm
    return {
        "noise without the factor C": replace(run, noise_multiplier=run.noise_multiplier / CLIP),
        "no clipping": replace(run, max_grad_norm=huge, noise_multiplier=run.noise_multiplier * CLIP / huge),
        "no noise": replace(run, noise_multiplier=0.0),
    }


def check(run: Run, seed: int) -> None:
    promise = claimed(run)
    assert audit(run, DELTA, seed) < promise
    for fault, faulty in broken(run).items():
        assert audit(faulty, DELTA, seed) > promise, fault


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"q={run.sample_rate}")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_lower_bound_is_below_the_claim_unless_broken(run: Run, seed: int) -> None:
    check(run, seed)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_lower_bound_is_below_the_claim_unless_broken_for_every_seed(stated: Callable[[str, int], None]) -> None:
    stated("audited runs, each whole and broken in three ways", len(FULL_SEEDS) * len(RUNS))
    for seed in FULL_SEEDS:
        for run in RUNS:
            check(run, seed)


def test_guesses_by_chance_refute_nothing_and_perfect_ones_much() -> None:
    facts = {"num_canaries": 600, "guesses": 400}
    assert lower_bound(DELTA, **facts, right=200) == 0
    assert lower_bound(DELTA, **facts, right=230) == 0
    # all right: refuted while p^400 < 0.001, so up to log(p / (1 - p)) at p = 0.001^(1/400)
    p = 0.001 ** (1 / 400)
    assert lower_bound(0.0, **facts, right=400) == pytest.approx(4.05, abs=0.02)
    assert p_value(4.05, 0.0, **facts, right=400) == pytest.approx(p**400, rel=0.05)
    assert lower_bound(DELTA, **facts, right=400) < lower_bound(0.0, **facts, right=400)
    assert p_value(0.0, 0.0, **facts, right=0) == 1
