"""Runs in which most batches are empty: noise is released all the same, parameters move, and every step is charged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.batch import Batch
from dit_dp.privacy import Facts, Ledger, Mechanism, PoissonSampler, epsilon
from dit_dp.training.step import train_step

SAMPLE, FULL = 5, 200
NUM_UNITS, RATE, STEPS, SIGMA, CLIP = 50, 2e-3, 8, 1.3, 0.5


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch  # type: ignore[misc]
    losses: Tensor = (model(x) - y).square().sum(1)
    return losses


def run(seed: int, path: Path, method: str = "bookkeeping") -> int:
    """Check one run; return how many of its batches were empty."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(NUM_UNITS, 3, generator=generator), torch.randn(NUM_UNITS, 2, generator=generator)
    sampler = PoissonSampler(NUM_UNITS, RATE, entropy=seed.to_bytes(32, "little"))
    engine = attach(model, method, max_grad_norm=CLIP)
    rate = 0.1
    optimizer = torch.optim.SGD(engine.parameters.values(), lr=rate)
    facts = Facts(
        dataset="x", num_units=NUM_UNITS, unit="image", sampling="poisson", noise_multiplier=SIGMA, sample_rate=RATE
    )
    num_empty, moves = 0, []
    with Ledger.open(path, facts) as ledger:
        for step in range(STEPS):
            index, before = sampler.draw(), torch.cat([p.detach().flatten().clone() for p in model.parameters()])
            expected = sampler.expected_batch_size
            ledger.charge(
                step=step, noise_multiplier=SIGMA, sample_rate=RATE, expected_batch_size=expected, max_grad_norm=CLIP
            )
            norms = train_step(
                engine,
                optimizer,
                loss_fn,
                [(x[index], y[index])],
                noise_multiplier=SIGMA,
                expected_batch_size=expected,
                generator=generator,
            )
            assert norms is not None
            assert norms.shape == (len(index),)
            moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before) / -rate * expected
            assert bool((moved != 0).all())
            if len(index) == 0:
                num_empty += 1
                moves.append(moved / (SIGMA * CLIP))
        assert ledger.mechanisms() == [Mechanism(noise_multiplier=SIGMA, sample_rate=RATE, num_steps=STEPS)]
    drawn = torch.stack(moves)
    assert len(drawn.unique(dim=0)) == num_empty  # no noise vector twice
    assert abs(float(drawn.std()) - 1) < 6 / (2 * drawn.numel()) ** 0.5
    return num_empty


@pytest.mark.parametrize("seed", range(SAMPLE))
def test_a_sample_of_runs(seed: int, tmp_path: Path) -> None:
    assert run(seed, tmp_path / "ledger.jsonl") > STEPS // 2


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_run(tmp_path: Path, stated: Callable[[str, int], None]) -> None:
    stated("seeds of runs with empty batches", FULL)
    found = [run(seed, tmp_path / f"{seed}.jsonl") for seed in range(FULL)]
    assert abs(sum(found) / (FULL * STEPS) - (1 - RATE) ** NUM_UNITS) < 0.05
    last = Ledger.read(tmp_path / f"{FULL - 1}.jsonl")
    whole = Mechanism(noise_multiplier=SIGMA, sample_rate=RATE, num_steps=STEPS)
    assert last.spent(1e-5) == epsilon(whole, 1e-5)


@pytest.mark.parametrize("method", ["auto", "ghost", "lean", "per_layer", "microbatch"])
def test_every_method_releases_noise_for_nobody(method: str, tmp_path: Path) -> None:
    assert run(1, tmp_path / "ledger.jsonl", method) > STEPS // 2
