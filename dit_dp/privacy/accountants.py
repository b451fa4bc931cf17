"""The three accountants: dp-accounting's PLD and RDP, and Opacus's PRV. None of them gets work without a bound.

The cost of a privacy loss distribution is the number of points of its grid: the span of the losses of all steps
together over the grid's step. dp-accounting's step of 1e-4 makes that billions where noise is small or steps are many;
here the step grows with the span, so that there are about `MOST_POINTS`. Rounding is upwards at any step, so the result
stays a bound, and where Renyi accounting gives a smaller one, that is taken. Where epsilon is in the thousands, Renyi
accounting is asked alone.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dit_dp.errors import UsageError
from dit_dp.privacy.accounting import Accountant, Mechanism

MOST_POINTS = 1 << 21
"""Of the composed distribution; that of one step, whose points dp-accounting computes one by one, has a quarter."""

INTERVAL = 1e-4
"""Grid step of privacy losses, unless there is a reason for another."""

PRV_ERROR = 0.01
"""What the PRV accountant may be off by, and adds to what it finds."""

_TAIL = 1e-15  # of the composed loss's mass, which dp-accounting cuts off


def renyi(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return epsilon by Renyi differential privacy (Mironov et al., arXiv 1908.10530)."""
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.rdp import RdpAccountant

    made = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    with _quiet():
        for mechanism in mechanisms:
            gaussian = dp_event.GaussianDpEvent(mechanism.noise_multiplier)
            made.compose(dp_event.PoissonSampledDpEvent(mechanism.sample_rate, gaussian), mechanism.num_steps)
        return float(made.get_epsilon(delta))


def loss_distribution(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return epsilon by privacy loss distributions; the smaller Renyi bound where they are coarse or inexact."""
    steps = sum(mechanism.num_steps for mechanism in mechanisms)
    if steps * 2**-53 > delta / 10:  # T-fold composition raises a transform to the T: that much of rounding error
        return renyi(mechanisms, delta)
    interval, coarse = _interval(mechanisms)
    if interval > 100 * INTERVAL:
        return renyi(mechanisms, delta)
    composed = None
    for mechanism in mechanisms:
        part = _composed(mechanism, interval)
        if part is None:
            return renyi(mechanisms, delta)
        composed = part if composed is None else composed.compose(part)
    assert composed is not None
    found = max(0.0, float(composed.get_epsilon_for_delta(delta)))
    return min(found, renyi(mechanisms, delta)) if coarse else found


def _composed(mechanism: Mechanism, interval: float) -> Any:
    """Return the distribution of one mechanism's steps, or `None` where dp-accounting would make it too large."""
    from dp_accounting.pld.common import compute_self_convolve_bounds

    sigma, rate, steps = mechanism.noise_multiplier, mechanism.sample_rate, mechanism.num_steps
    if rate == 1:  # the sum of Gaussian mechanisms is one
        return _single(sigma / math.sqrt(steps), 1.0, interval)
    single = _single(sigma, rate, interval)
    for pmf in (single._pmf_remove, single._pmf_add):
        low, high = compute_self_convolve_bounds(pmf._probs, steps, _TAIL)
        if high - low > 4 * MOST_POINTS:  # so many steps on so few points that its bound on the tails is far off
            return None
    return single.self_compose(steps) if steps > 1 else single


@functools.lru_cache(maxsize=2)
def _single(sigma: float, rate: float, interval: float) -> Any:
    """Return the distribution of one step, in both directions.

    Dense, since dp-accounting raises the size of a sparse one to the number of steps, as an integer of all its digits.
    """
    from dp_accounting.pld import privacy_loss_distribution

    made = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=rate, value_discretization_interval=interval
    )
    remove, add = made._pmf_remove.to_dense_pmf(), made._pmf_add.to_dense_pmf()
    return privacy_loss_distribution.PrivacyLossDistribution(remove, None if made._symmetric else add)


def _interval(mechanisms: Sequence[Mechanism]) -> tuple[float, bool]:
    """Return the grid's step, and whether the grid's size made it larger than it should be.

    It should be well below the spread of a step's loss, exp(loss) having variance q^2 (exp(1 / sigma^2) - 1), or
    rounding up adds more than there is.
    """
    spans, spreads = [2 * renyi(mechanisms, _TAIL)], []
    for mechanism in mechanisms:
        sigma, steps, rate = mechanism.noise_multiplier, mechanism.num_steps, mechanism.sample_rate
        effective = sigma / math.sqrt(steps) if rate == 1 else sigma
        below = 10 / effective if rate == 1 else min(10 / effective, -math.log1p(-rate))
        spans.append(4 * (effective**-2 / 2 + 10 / effective + below))  # of one step, 10 deviations of the noise off
        spreads.append(rate * math.sqrt(math.expm1(min(effective**-2, 100))))
    fine = min(INTERVAL, min(spreads) / 4)
    needed = max(spans) / MOST_POINTS
    return max(fine, needed), needed > fine


def opacus_prv(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return epsilon by Opacus's accountant of privacy loss random variables.

    Raises:
        UsageError: It would need too many points, or cannot do it.
    """
    steps = sum(mechanism.num_steps for mechanism in mechanisms)
    mesh = PRV_ERROR / math.sqrt(steps * math.log(12_000 / delta) / 2)
    if not (span := 2 * renyi(mechanisms, delta / 4000) + 6) / mesh <= 4 * MOST_POINTS:
        raise UsageError(f"accountant: prv would need {span / mesh:.1e} points for this; take pld")
    import numpy as np
    from opacus.accountants import PRVAccountant

    made = PRVAccountant()
    made.history = [(m.noise_multiplier, m.sample_rate, m.num_steps) for m in mechanisms]
    try:
        with np.errstate(all="ignore"):
            return max(0.0, float(made.get_epsilon(delta, eps_error=PRV_ERROR)))
    except (RuntimeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"accountant: prv cannot do this: {error}; take pld") from None


ACCOUNTANTS: dict[Accountant, Callable[[Sequence[Mechanism], float], float]] = {
    "pld": loss_distribution,
    "rdp": renyi,
    "prv": opacus_prv,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about Renyi orders that are left out of a minimum, which stays a bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
