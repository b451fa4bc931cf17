"""Epsilon against a closed form and a looser accountant; the noise multiplier as its inverse; what is refused."""

import math
import random
from statistics import NormalDist
from typing import Any

import pytest

from dit_dp.errors import UsageError
from dit_dp.privacy import Mechanism, epsilon, noise_multiplier

NUM_POINTS, FULL_POINTS = 6, 200


def gaussian_delta(sigma: float, eps: float) -> float:
    """The Gaussian mechanism's delta (Balle and Wang, arXiv 1805.06530, theorem 8), sensitivity 1."""
    phi = NormalDist().cdf
    return phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 8.0])
def test_one_step_on_everybody_is_the_gaussian_mechanism(sigma: float) -> None:
    found = epsilon(Mechanism(noise_multiplier=sigma, sample_rate=1.0, num_steps=1), 1e-5)
    assert gaussian_delta(sigma, found) <= 1e-5
    assert gaussian_delta(sigma, found - 2e-3) > 1e-5


def points(count: int, seed: int = 0) -> list[tuple[float, float, int, float]]:
    """Draw (sigma, q, T, delta)."""
    drawn = random.Random(seed)
    return [
        (
            drawn.uniform(0.6, 4),
            10 ** drawn.uniform(-3.5, -0.5),
            int(10 ** drawn.uniform(0, 3.5)),
            10 ** drawn.uniform(-8, -4),
        )
        for _ in range(count)
    ]


def check_point(sigma: float, q: float, steps: int, delta: float) -> None:
    """0 <= PLD <= RDP, and more noise, fewer steps or rarer sampling cost no more."""
    here = epsilon(Mechanism(noise_multiplier=sigma, sample_rate=q, num_steps=steps), delta)
    rdp = epsilon(Mechanism(noise_multiplier=sigma, sample_rate=q, num_steps=steps), delta, "rdp")
    assert 0 <= here <= rdp + 1e-2
    for other in (
        Mechanism(noise_multiplier=1.3 * sigma, sample_rate=q, num_steps=steps),
        Mechanism(noise_multiplier=sigma, sample_rate=0.7 * q, num_steps=steps),
        Mechanism(noise_multiplier=sigma, sample_rate=q, num_steps=steps // 2),
    ):
        assert epsilon(other, delta) <= here + 1e-3


@pytest.mark.parametrize("point", points(NUM_POINTS), ids=str)
def test_the_authority_is_below_renyi_and_monotone(point: tuple[float, float, int, float]) -> None:
    check_point(*point)


@pytest.mark.full
def test_the_authority_is_below_renyi_and_monotone_on_the_whole_grid() -> None:
    for point in points(FULL_POINTS, seed=1):
        check_point(*point)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"), [(8.0, 1e-6, 4096 / 1281167, 2000), (0.5, 1e-7, 0.1, 10), (3.0, 1e-6, 1.0, 1)]
)
def test_the_noise_multiplier_keeps_the_budget_and_is_no_larger_than_it_must(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = noise_multiplier(target_epsilon=target, delta=delta, sample_rate=rate, num_steps=steps)
    assert epsilon(Mechanism(noise_multiplier=sigma, sample_rate=rate, num_steps=steps), delta) <= target
    less = Mechanism(noise_multiplier=0.997 * sigma, sample_rate=rate, num_steps=steps)
    assert epsilon(less, delta) > target


def test_no_step_costs_nothing() -> None:
    assert epsilon(Mechanism(noise_multiplier=1.0, sample_rate=0.1, num_steps=0), 1e-6) == 0


GOOD: dict[str, Any] = {"target_epsilon": 8.0, "delta": 1e-6, "sample_rate": 0.01, "num_steps": 100}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_epsilon", 0.0),
        ("target_epsilon", -1.0),
        ("target_epsilon", math.nan),
        ("target_epsilon", math.inf),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
        ("delta", "1e-6"),
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("sample_rate", math.nan),
        ("num_steps", 0),
        ("num_steps", 1.5),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{name.removeprefix('target_')}: got "):
        noise_multiplier(**{**GOOD, name: value})


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_noise_multiplier_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(UsageError, match=r"^noise_multiplier: got "):
        Mechanism(noise_multiplier=sigma, sample_rate=0.1, num_steps=1)


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^epsilon: got 1e-09"):
        noise_multiplier(target_epsilon=1e-9, delta=1e-12, sample_rate=1.0, num_steps=10**6)
