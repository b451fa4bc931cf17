"""From a budget to what may be done with it: the noise multiplier for a number of steps, the steps for some noise."""

import math
from collections.abc import Callable, Sequence

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.privacy.accounting import (
    MOST_STEPS,
    SMALLEST_NOISE,
    TIME_LIMIT_S,
    Accountant,
    Mechanism,
    check_delta,
    compose,
    within,
)

TOLERANCE = 1e-3
"""Relative error of the noise multiplier, upwards only, so that the target is kept."""

_LARGEST = 1e6
"""The largest noise multiplier that is considered."""


def noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    num_steps: int,
    time_limit_s: float = TIME_LIMIT_S,
) -> float:
    """Return a noise multiplier at which a run stays within a budget, at most 0.1 % above the smallest one.

    Args:
        target_epsilon: > 0.
        delta: In (0, 1).
        sample_rate: q in (0, 1].
        num_steps: T >= 1.
        time_limit_s: Seconds it may take.

    Raises:
        UsageError: A value is out of range, no noise multiplier considered keeps the budget, or the time is over.
    """
    validate.real("epsilon", target_epsilon, positive=True)
    check_delta(delta)
    validate.integer("num_steps", num_steps)
    Mechanism(noise_multiplier=1.0, sample_rate=sample_rate, num_steps=num_steps)

    def excess(log_sigma: float, accountant: Accountant = "pld") -> float:
        """Return the logarithm of what is spent over what may be; it falls as noise grows."""
        sigma = max(math.exp(log_sigma), SMALLEST_NOISE)
        run = Mechanism(noise_multiplier=sigma, sample_rate=sample_rate, num_steps=num_steps)
        return math.log(max(compose([run], delta, accountant), 1e-12) / target_epsilon)

    return within(time_limit_s, lambda: _least_noise(excess, target_epsilon))


def _least_noise(excess: Callable[..., float], target_epsilon: float) -> float:
    """Return the noise multiplier at which `excess` is just below 0."""
    low, high = math.log(SMALLEST_NOISE), math.log(_LARGEST)
    if excess(high, "rdp") > 0:
        fix = "or take fewer steps, or a larger delta"
        raise UsageError.for_value("epsilon", target_epsilon, "a larger budget", fix)
    while high - low > 0.02:  # the looser bound, which is cheap
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle, "rdp") > 0 else (low, middle)
    slope = (excess(high + 0.05, "rdp") - excess(high, "rdp")) / 0.05
    return max(math.exp(_descend(excess, high, min(slope, -0.1))), SMALLEST_NOISE)


def _descend(excess: Callable[..., float], x: float, slope: float) -> float:
    """Return where a falling function is at most 0, and not further below than `TOLERANCE` of x is worth.

    Secant steps from a point and the slope there, aimed at the middle of what is accepted; few, since every value of
    the function is an accountant's run.
    """
    value = excess(x)
    while not slope * TOLERANCE <= value <= 0:
        if value == math.inf or x > math.log(_LARGEST):
            raise UsageError("delta: too small for the accountant, whose own truncation is larger; take a larger one")
        if x < math.log(SMALLEST_NOISE) and value < 0:
            return x
        step = (slope * TOLERANCE / 2 - value) / slope
        step = max(-0.5, min(0.5, step))
        before, x = value, x + step
        value = excess(x)
        if step and (value - before) / step < 0:
            slope = (value - before) / step
    return x


def steps_within(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    spent: Sequence[Mechanism] = (),
    time_limit_s: float = TIME_LIMIT_S,
) -> int:
    """Return how many steps a budget allows: the largest number that keeps it; one more would overspend.

    Args:
        target_epsilon: > 0.
        delta: In (0, 1).
        noise_multiplier: sigma; 0 allows no step.
        sample_rate: q in (0, 1].
        spent: What was charged to the budget before, such as `Ledger.mechanisms()`.
        time_limit_s: Seconds it may take.

    Returns:
        0 to a billion, which stands for any number.

    Raises:
        UsageError: A value is out of range, or the time is over.
    """
    validate.real("epsilon", target_epsilon, positive=True)
    check_delta(delta)
    step = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate}
    Mechanism(**step, num_steps=1)
    most = MOST_STEPS - sum(mechanism.num_steps for mechanism in spent)

    def cost(num_steps: int, accountant: Accountant = "pld") -> float:
        return compose([*spent, Mechanism(**step, num_steps=num_steps)], delta, accountant)

    return within(time_limit_s, lambda: _most_steps(cost, target_epsilon, most))


def _most_steps(cost: Callable[..., float], target: float, most: int) -> int:
    """Return the largest number up to `most` that costs at most the target.

    Bisection by the looser bound, which is cheap; then the authority is asked where a power of the steps that passes
    through both ends of the bracket meets the target.
    """
    low, high = 0, most + 1
    while high - low > 1 + low // 50:
        middle = math.isqrt(max(low, 1) * high) if high > 4 * low else (low + high) // 2
        low, high = (middle, high) if cost(middle, "rdp") <= target else (low, middle)
    known, high, above = cost(low), most + 1, math.inf
    if known > target:  # the two bounds touch, and round
        low, high, known, above = 0, low, 0.0, known
    while high - low > 1:
        middle = min(max(_meeting(target, low, known, high, above), low + 1), high - 1)
        found = cost(middle)
        if found <= target:
            low, known = middle, found
        else:
            high, above = middle, found
    return low


def _meeting(target: float, low: int, known: float, high: int, above: float) -> int:
    """Return where a power of the steps that costs `known` at `low` and `above` at `high` costs the target."""
    if above == math.inf:
        guess = 4 * max(low, 0.25) if known == 0 else low * (target / known) ** (1 / 0.6)
        return math.ceil(min(guess, 4 * max(low, 1)))
    if low == 0 or known == 0:
        return math.isqrt(max(low, 1) * high)
    power = max(math.log(above / known) / math.log(high / low), 0.05)
    return int(min(low * (target / known) ** (1 / power), high))
