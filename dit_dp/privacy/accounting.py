"""Epsilon of DP-SGD by Google's dp-accounting, and the noise multiplier for a target epsilon. No torch.

Neighbouring data sets differ by one unit, added or removed. Each step samples units independently (Poisson, rate q),
sums contributions of norm at most C and adds Gaussian noise of standard deviation sigma C. The authority is the
accountant of privacy loss distributions (PLD; Doroshenko et al., arXiv 2207.04380), whose bound is rounded up; Renyi
accounting, which is looser, brackets the search.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dit_dp import validate
from dit_dp.errors import UsageError

Accountant = Literal["pld", "rdp"]

TOLERANCE = 1e-3
"""Relative error of the noise multiplier, upwards only, so that the target is kept."""

_SMALLEST, _LARGEST = 1e-2, 1e6
"""Noise multipliers that are considered."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """DP-SGD with Poisson sampling.

    Attributes:
        noise_multiplier: sigma > 0.
        sample_rate: q in (0, 1], the probability with which a unit is in a step.
        num_steps: T >= 0.

    Raises:
        UsageError: A value is out of range.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int

    def __post_init__(self) -> None:
        validate.real("noise_multiplier", self.noise_multiplier, positive=True)
        validate.real("sample_rate", self.sample_rate, positive=True)
        if self.sample_rate > 1:
            raise UsageError.for_value("sample_rate", self.sample_rate, "a number > 0 and <= 1")
        validate.integer("num_steps", self.num_steps, minimum=0)


def epsilon(mechanism: Mechanism, delta: float, accountant: Accountant = "pld") -> float:
    """Return the epsilon of a run at delta, for adding or removing one unit.

    Args:
        mechanism: What runs.
        delta: In (0, 1).
        accountant: ``pld``, the authority, or ``rdp``, a cross-check that is never below it but by rounding.

    Raises:
        UsageError: delta is out of range.
    """
    _check_delta(delta)
    validate.one_of("accountant", accountant, ("pld", "rdp"))
    if mechanism.num_steps == 0:
        return 0.0
    made = _accountant(accountant)
    with _quiet():
        made.compose(_event(mechanism))
        return float(made.get_epsilon(delta))


def noise_multiplier(*, target_epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return a noise multiplier at which a run stays within a budget, at most 0.1 % above the smallest one.

    Args:
        target_epsilon: > 0.
        delta: In (0, 1).
        sample_rate: q in (0, 1].
        num_steps: T >= 1.

    Raises:
        UsageError: A value is out of range, or no noise multiplier considered keeps the budget.
    """
    validate.real("epsilon", target_epsilon, positive=True)
    _check_delta(delta)
    validate.integer("num_steps", num_steps)

    def excess(log_sigma: float, accountant: Accountant = "pld") -> float:
        """Return the logarithm of what is spent over what may be; it falls as noise grows."""
        sigma = math.exp(log_sigma)
        run = Mechanism(noise_multiplier=sigma, sample_rate=sample_rate, num_steps=num_steps)
        return math.log(max(epsilon(run, delta, accountant), 1e-12) / target_epsilon)

    low, high = math.log(_SMALLEST), math.log(_LARGEST)
    if excess(high, "rdp") > 0:
        fix = "or take fewer steps, or a larger delta"
        raise UsageError.for_value("epsilon", target_epsilon, "a larger budget", fix)
    while high - low > 0.02:  # the looser bound, which is cheap
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle, "rdp") > 0 else (low, middle)
    slope = (excess(high + 0.05, "rdp") - excess(high, "rdp")) / 0.05
    return math.exp(_descend(excess, high, min(slope, -0.1)))


def _descend(excess: Callable[[float], float], x: float, slope: float) -> float:
    """Return where a falling function is at most 0, and not further below than `TOLERANCE` of x is worth.

    Secant steps from a point and the slope there, aimed at the middle of what is accepted; few, since every value of
    the function is an accountant's run.
    """
    value = excess(x)
    while not slope * TOLERANCE <= value <= 0:
        if value == math.inf or x > math.log(_LARGEST):
            raise UsageError("delta: too small for the accountant, whose own truncation is larger; take a larger one")
        if x < math.log(_SMALLEST) and value < 0:
            return x
        step = (slope * TOLERANCE / 2 - value) / slope
        step = max(-0.5, min(0.5, step))
        before, x = value, x + step
        value = excess(x)
        if step and (value - before) / step < 0:
            slope = (value - before) / step
    return x


def _check_delta(delta: float) -> None:
    validate.real("delta", delta, positive=True)
    if delta >= 1:
        raise UsageError.for_value("delta", delta, "a number > 0 and < 1")


def _accountant(name: Accountant) -> Any:
    from dp_accounting import NeighboringRelation

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if name == "rdp":
        from dp_accounting.rdp import RdpAccountant

        return RdpAccountant(neighboring_relation=relation)
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(neighboring_relation=relation)


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


def _event(mechanism: Mechanism) -> Any:
    from dp_accounting import dp_event

    sampled = dp_event.PoissonSampledDpEvent(
        mechanism.sample_rate, dp_event.GaussianDpEvent(mechanism.noise_multiplier)
    )
    return dp_event.SelfComposedDpEvent(sampled, mechanism.num_steps)
