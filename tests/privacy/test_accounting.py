"""Epsilon against a closed form and two other accountants; its inverses; what is refused, and in what time."""

import logging
import math
import random
import threading
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest

from dit_dp.errors import UsageError
from dit_dp.privacy import (
    Mechanism,
    PrivacyStatement,
    accountants,
    check_delta,
    epsilon,
    epsilon_of,
    noise_multiplier,
    steps_within,
)
from dit_dp.privacy.accounting import within
from dit_dp.privacy.statement import rounded_up

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
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize("part", range(FULL_POINTS // 20))
def test_the_authority_is_below_renyi_and_monotone_on_the_whole_grid(
    part: int, stated: Callable[[str, int], None]
) -> None:
    stated("points of the accountants' grid", 20)
    for point in points(FULL_POINTS, seed=1)[20 * part : 20 * part + 20]:
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


def run(sigma: float, rate: float, steps: int) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, sample_rate=rate, num_steps=steps)


def test_a_composition_in_parts_is_the_whole() -> None:
    parts = [run(1.1, 0.02, 300), run(1.1, 0.02, 0), run(1.1, 0.02, 200)]
    assert epsilon_of(parts, 1e-5) == epsilon(run(1.1, 0.02, 500), 1e-5)
    assert epsilon_of([], 1e-5) == 0


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_two_mechanisms_cost_more_than_either_and_less_than_both_summed(accountant: Any) -> None:
    one, other = run(1.0, 0.01, 400), run(2.0, 0.1, 50)
    both = epsilon_of([one, other], 1e-5, accountant)
    alone = [epsilon(mechanism, 1e-5, accountant) for mechanism in (one, other)]
    assert max(alone) < both < sum(alone)
    assert both == epsilon_of([other, one], 1e-5, accountant)


def test_gaussian_mechanisms_on_everybody_are_one() -> None:
    found = epsilon_of([run(3.0, 1.0, 4), run(2.0, 1.0, 3)], 1e-6)
    sigma = (4 / 9 + 3 / 4) ** -0.5
    assert gaussian_delta(sigma, found) <= 1e-6
    assert gaussian_delta(sigma, found - 2e-3) > 1e-6


@pytest.mark.parametrize("mechanisms", [[run(2.0, 0.1, 100), run(1.5, 0.05, 30)]], ids=str)
def test_opacus_finds_the_same(mechanisms: list[Mechanism]) -> None:
    """Its bound is what it finds plus its error, 0.01, and half a thousandth of delta."""
    pld, prv = epsilon_of(mechanisms, 1e-5), epsilon_of(mechanisms, 1e-5, "prv")
    assert pld - 1e-3 <= prv <= pld + 0.03


def test_noise_of_zero_is_no_privacy() -> None:
    assert epsilon_of([run(1.0, 0.1, 3), run(0.0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon(run(0.0, 0.1, 0), 1e-5) == 0


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [
        (0.01, 0.5, 10**9),
        (0.01, 1e-6, 1),
        (0.05, 1.0, 10**9),
        (1.0, 0.01, 10**9),
        (1e4, 0.5, 10**9),
        (1e4, 0.5, 10**5),
        pytest.param(0.3, 1e-9, 10**6, marks=pytest.mark.full),
        (1e6, 1.0, 10**9),
    ],
)
@pytest.mark.timeout(60)
def test_the_absurd_is_answered_with_a_bound(sigma: float, rate: float, steps: int) -> None:
    found = epsilon(run(sigma, rate, steps), 1e-5)
    assert 0 <= found <= epsilon(run(sigma, rate, steps), 1e-5, "rdp") + 1e-2


def test_little_sampling_with_much_noise_is_accounted_for_finely() -> None:
    """The loss of a step is spread over 5e-5: on a grid of 1e-4 rounding up would be most of it."""
    mechanism = run(1000.0, 0.05, 100_000)
    # the central limit: losses of mean mu^2 / 2 and variance mu^2, as of one Gaussian mechanism with sigma = 1 / mu
    sigma = 1 / (0.05 * math.sqrt(100_000 * math.expm1(1e-6)))
    found = epsilon(mechanism, 1e-5)
    assert gaussian_delta(sigma, 1.02 * found) <= 1e-5
    assert gaussian_delta(sigma, 0.98 * found) > 1e-5


@pytest.mark.parametrize(
    ("target", "sigma", "rate", "spent"),
    [
        (2.0, 1.1, 0.02, []),
        (5.0, 2.0, 1.0, []),
        pytest.param(3.0, 1.5, 0.05, [run(1.0, 0.01, 100)], marks=pytest.mark.full),
        pytest.param(8.0, 0.8, 0.003, [], marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_steps_keep_the_budget_and_one_more_does_not(
    target: float, sigma: float, rate: float, spent: list[Mechanism]
) -> None:
    steps = steps_within(target_epsilon=target, delta=1e-5, noise_multiplier=sigma, sample_rate=rate, spent=spent)
    assert steps > 0
    assert epsilon_of([*spent, run(sigma, rate, steps)], 1e-5) <= target
    assert epsilon_of([*spent, run(sigma, rate, steps + 1)], 1e-5) > target


def test_a_spent_budget_allows_no_step() -> None:
    budget: dict[str, Any] = {"target_epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.5}
    assert steps_within(**budget, noise_multiplier=1.0) == 0
    assert steps_within(**budget, noise_multiplier=0.0) == 0
    assert steps_within(**budget, noise_multiplier=8.0, spent=[run(1.0, 0.5, 10)]) == 0
    assert steps_within(**{**budget, "sample_rate": 1e-9}, noise_multiplier=1e6) == 10**9


def test_an_accountant_that_takes_too_long_is_left() -> None:
    ended = threading.Event()
    with pytest.raises(UsageError, match=r"^accountant: no answer after 0\.01 s"):
        within(0.01, lambda: ended.wait(60))
    ended.set()
    assert within(60.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60.0, lambda: 1 // 0)


def test_every_accountants_call_has_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def slow(mechanisms: list[Mechanism], delta: float) -> float:
        ended.wait(60)
        return 1.0

    monkeypatch.setattr(accountants, "ACCOUNTANTS", dict.fromkeys(("pld", "rdp", "prv"), slow))
    calls: list[Callable[[], object]] = [
        lambda: epsilon(run(1.0, 0.1, 1), 1e-5, time_limit_s=0.01),
        lambda: epsilon_of([run(1.0, 0.1, 1)], 1e-5, "prv", time_limit_s=0.01),
        lambda: noise_multiplier(target_epsilon=1.0, delta=1e-5, sample_rate=0.1, num_steps=10, time_limit_s=0.01),
        lambda: steps_within(target_epsilon=1.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.1, time_limit_s=0.01),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="no answer after"):
            call()
    ended.set()


GOOD: dict[str, Any] = {"target_epsilon": 8.0, "delta": 1e-6, "sample_rate": 0.01, "num_steps": 100}


@pytest.mark.counted
@pytest.mark.timeout(1)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_epsilon", 0.0),
        ("target_epsilon", -1.0),
        ("target_epsilon", math.nan),
        ("target_epsilon", math.inf),
        ("target_epsilon", "8"),
        ("delta", 0.0),
        ("delta", -1e-6),
        ("delta", 1.0),
        ("delta", math.nan),
        ("delta", "1e-6"),
        ("sample_rate", 0.0),
        ("sample_rate", -0.1),
        ("sample_rate", 1.5),
        ("sample_rate", math.nan),
        ("num_steps", 0),
        ("num_steps", -1),
        ("num_steps", 1.5),
        ("num_steps", 10**9 + 1),
        ("num_steps", True),
        ("time_limit_s", 0.0),
        ("time_limit_s", math.nan),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any, stated: Callable[[str, int], None]) -> None:
    stated("bad inputs of an accountant, each refused within a second", 1)
    with pytest.raises(UsageError, match=rf"^{name.removeprefix('target_')}: got "):
        noise_multiplier(**{**GOOD, name: value})


@pytest.mark.counted
@pytest.mark.timeout(1)
@pytest.mark.parametrize("sigma", [-1.0, 1e-3, 1e-300, math.nan, math.inf, "1.0", None])
def test_a_noise_multiplier_out_of_range_is_refused(sigma: Any, stated: Callable[[str, int], None]) -> None:
    stated("bad inputs of an accountant, each refused within a second", 1)
    with pytest.raises(UsageError, match=r"^noise_multiplier: got "):
        Mechanism(noise_multiplier=sigma, sample_rate=0.1, num_steps=1)
    with pytest.raises(UsageError, match=r"^noise_multiplier: got "):
        steps_within(target_epsilon=1.0, delta=1e-5, noise_multiplier=sigma, sample_rate=0.1)


@pytest.mark.counted
@pytest.mark.timeout(1)
@pytest.mark.parametrize("accountant", ["gdp", "PLD", ""])
def test_an_unknown_accountant_is_refused(accountant: Any, stated: Callable[[str, int], None]) -> None:
    """Gaussian differential privacy among them: for sampled steps it is no bound."""
    stated("bad inputs of an accountant, each refused within a second", 1)
    with pytest.raises(UsageError, match=r"^accountant: got .*; accepted: pld, rdp, prv$"):
        epsilon(run(1.0, 0.1, 1), 1e-5, accountant)


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^epsilon: got 1e-09"):
        noise_multiplier(target_epsilon=1e-9, delta=1e-12, sample_rate=1.0, num_steps=10**6)


def test_what_opacus_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^accountant: prv .*take pld$"):
        epsilon(run(0.01, 0.5, 10**6), 1e-5, "prv")


def test_a_delta_that_promises_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_delta(1e-5, 1000)
        assert caplog.messages == []
        check_delta(1e-3, 1000)
    assert caplog.messages == ["delta: got 0.001 for 1000 units; a promise needs delta well below 0.001"]


def statement(**changes: Any) -> PrivacyStatement:
    values = {"mechanisms": (run(1.1, 0.05, 10),), "delta": 1e-5, "unit": "set", "num_units": 4000}
    return PrivacyStatement(**{**values, **changes})


def test_a_statement_never_says_epsilon_alone() -> None:
    text = str(statement())
    assert text.startswith(f"epsilon {rounded_up(epsilon(run(1.1, 0.05, 10), 1e-5))}, delta 1e-05; ")
    for words in ("unit: set, 4000", "neighbours: add or remove one unit", "sampling: Poisson", "noise multiplier 1.1"):
        assert words in text
    assert "promises nothing" not in text
    assert "promises nothing" in str(statement(num_units=100_000))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanisms": (run(0.0, 0.05, 10),)}, "no privacy: the noise multiplier is 0, delta"),
        ({"sampling": "shuffled"}, "fixed batches: no epsilon is claimed, delta"),
        ({"sampling": "shuffled", "mechanisms": (run(0.0, 0.05, 10),)}, "no privacy: "),
        ({"mechanisms": (run(1.1, 0.05, 10), run(0.0, 0.05, 1))}, "no privacy: "),
    ],
)
def test_a_statement_without_a_claim_says_so(changes: dict[str, Any], words: str) -> None:
    made = statement(**changes)
    assert str(made).startswith(words)
    assert "epsilon" not in str(made).replace("no epsilon is claimed", "")
    assert made.epsilon == math.inf
