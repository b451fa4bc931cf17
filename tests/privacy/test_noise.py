"""The noise that engines release is Gaussian with standard deviation sigma C, and every release has its own."""

import random
from collections.abc import Callable

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.noise import entropy_size, generator_of

SIGMA, CLIP, EXPECTED_BATCH = 0.7, 3.0, 8.0
CPU = torch.device("cpu")


def released(method: str, count: int, generator: torch.Generator, releases: int = 1) -> Tensor:
    """Return (releases, count) gradients of empty batches, in units of what their standard deviation should be."""
    model = nn.Linear(count // 100, 100, bias=False)
    engine = attach(model, method, max_grad_norm=CLIP)
    found = []
    for _ in range(releases):
        engine.accumulate(lambda model, batch: model(batch[0]).sum(1), (torch.zeros(0, count // 100),))
        engine.privatize(noise_multiplier=SIGMA, expected_batch_size=EXPECTED_BATCH, generator=generator)
        assert model.weight.grad is not None
        found.append(model.weight.grad.flatten().clone())
        engine.zero_grad()
    return torch.stack(found) * EXPECTED_BATCH / (SIGMA * CLIP)


def check(method: str, seed: int) -> None:
    """A million draws: Kolmogorov and Smirnov find nothing, and the standard deviation is within half a percent."""
    entropy = random.Random(seed).randbytes(entropy_size(CPU))
    drawn = released(method, 1_000_000, generator_of(entropy, CPU))[0]
    assert kstest(drawn.double().numpy(), "norm").pvalue > 1e-4
    assert abs(float(drawn.std()) - 1) < 0.005
    assert abs(float(drawn.mean())) < 0.005


def test_a_million_draws_are_gaussian() -> None:
    check("bookkeeping", 0)


@pytest.mark.full
@pytest.mark.parametrize("method", ["auto", "bookkeeping", "ghost", "lean", "per_layer", "microbatch"])
def test_a_million_draws_are_gaussian_for_every_method(method: str, stated: Callable[[str, int], None]) -> None:
    stated("sets of 1e6 noise draws", 3)
    for seed in range(3):
        check(method, seed)


def test_releases_are_independent() -> None:
    releases, count = 20, 20_000
    generator = generator_of(random.Random(1).randbytes(entropy_size(CPU)), CPU)
    drawn = released("bookkeeping", count, generator, releases)
    correlations = (drawn @ drawn.T / count)[~torch.eye(releases, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 6 / count**0.5  # 190 pairs
    assert float((drawn[:, 1:] * drawn[:, :-1]).mean().abs()) < 6 / (releases * count) ** 0.5
