"""Epsilon of DP-SGD by Google's dp-accounting, cross-checked by Renyi accounting and by Opacus. No torch.

Neighbouring data sets differ by one unit, added or removed. Each step samples units independently (Poisson, rate q),
sums contributions of norm at most C and adds Gaussian noise of standard deviation sigma C. The authority is the
accountant of privacy loss distributions (PLD; Doroshenko et al., arXiv 2207.04380), whose bound is rounded up. Gaussian
differential privacy is not offered: for sampled steps it is a limit, and no bound.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dit_dp import validate
from dit_dp.errors import UsageError

Accountant = Literal["pld", "rdp", "prv"]
Sampling = Literal["poisson", "shuffled"]
Unit = Literal["image", "set"]

ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp", "prv")
SAMPLINGS: tuple[Sampling, ...] = ("poisson", "shuffled")
UNITS: tuple[Unit, ...] = ("image", "set")
ADJACENCY = "add or remove one unit"

SMALLEST_NOISE = 1e-2
"""Less noise is refused: one step on everybody would cost an epsilon of thousands."""

MOST_STEPS = 10**9
TIME_LIMIT_S = 60.0
"""Seconds that an accountant may take."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """DP-SGD with Poisson sampling.

    Attributes:
        noise_multiplier: sigma, 0 or >= 0.01; 0 is no privacy: an infinite epsilon.
        sample_rate: q in (0, 1], the probability with which a unit is in a step.
        num_steps: T, 0 to a billion.

    Raises:
        UsageError: A value is out of range.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int

    def __post_init__(self) -> None:
        validate.real("noise_multiplier", self.noise_multiplier, positive=False)
        if 0 < self.noise_multiplier < SMALLEST_NOISE:
            accepted = f"0, which is no privacy, or a number >= {SMALLEST_NOISE}"
            raise UsageError.for_value("noise_multiplier", self.noise_multiplier, accepted)
        check_sample_rate(self.sample_rate)
        validate.integer("num_steps", self.num_steps, minimum=0)
        if self.num_steps > MOST_STEPS:
            raise UsageError.for_value("num_steps", self.num_steps, f"an integer <= {MOST_STEPS}")


def epsilon(
    mechanism: Mechanism, delta: float, accountant: Accountant = "pld", *, time_limit_s: float = TIME_LIMIT_S
) -> float:
    """Return the epsilon of a run at delta; see `epsilon_of`."""
    return epsilon_of([mechanism], delta, accountant, time_limit_s=time_limit_s)


def epsilon_of(
    mechanisms: Sequence[Mechanism],
    delta: float,
    accountant: Accountant = "pld",
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> float:
    """Return the epsilon of several mechanisms on the same data, one after the other, for one unit more or less.

    Args:
        mechanisms: What ran; each may have been chosen by what those before released.
        delta: In (0, 1).
        accountant: ``pld``, the authority; ``rdp``, which is never below it but by rounding; or ``prv``, Opacus's own
            (Gopi et al., arXiv 2106.02848), another way to the same number, with an error of 0.01. They are
            cross-checks.
        time_limit_s: Seconds it may take.

    Returns:
        At least 0; infinite if any step had no noise.

    Raises:
        UsageError: A value is out of range, or the time is over.
    """
    check_delta(delta)
    validate.one_of("accountant", accountant, ACCOUNTANTS)
    return within(time_limit_s, lambda: compose(mechanisms, delta, accountant))


def compose(mechanisms: Sequence[Mechanism], delta: float, accountant: Accountant = "pld") -> float:
    """Do what `epsilon_of` does, without checks and without a limit."""
    from dit_dp.privacy import accountants

    run = merged(mechanisms)
    if not run:
        return 0.0
    if any(mechanism.noise_multiplier == 0 for mechanism in run):
        return math.inf
    return accountants.ACCOUNTANTS[accountant](run, delta)


def merged(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """Return the same composition with equal steps counted together, and none of no steps."""
    counts: dict[tuple[float, float], int] = {}
    for mechanism in mechanisms:
        key = (float(mechanism.noise_multiplier), float(mechanism.sample_rate))
        counts[key] = counts.get(key, 0) + mechanism.num_steps
    return [
        Mechanism(noise_multiplier=sigma, sample_rate=rate, num_steps=steps)
        for (sigma, rate), steps in sorted(counts.items())
        if steps
    ]


def check_sample_rate(sample_rate: float) -> None:
    """Raise `UsageError` unless a sample rate is in (0, 1]."""
    validate.real("sample_rate", sample_rate, positive=True)
    if sample_rate > 1:
        raise UsageError.for_value("sample_rate", sample_rate, "a number > 0 and <= 1")


def check_delta(delta: float, num_units: int | None = None) -> None:
    """Raise `UsageError` unless delta is in (0, 1); warn of one that promises nothing to a data set of this size.

    A mechanism that publishes each unit with probability delta keeps any epsilon at that delta; of N units it would
    publish N delta.
    """
    validate.real("delta", delta, positive=True)
    if delta >= 1:
        raise UsageError.for_value("delta", delta, "a number > 0 and < 1")
    if num_units is not None and delta * num_units >= 1:
        logger.warning(
            "delta: got %g for %d units; a promise needs delta well below %g", delta, num_units, 1 / num_units
        )


def within(time_limit_s: float, function: Callable[[], T]) -> T:
    """Return what a function returns, if it takes no longer than a limit.

    It runs on a thread of its own, which is left alone when the time is over: a thread cannot be ended. What the
    accountants compute is bounded in size, so that it ends by itself.

    Raises:
        UsageError: The time is over.
    """
    validate.real("time_limit_s", time_limit_s, positive=True)
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="accountant", daemon=True)
    thread.start()
    thread.join(time_limit_s)
    if not outcome:
        raise UsageError(
            f"accountant: no answer after {time_limit_s:g} s; take fewer steps, more noise or accountant rdp"
        )
    value, error = outcome[0]
    if error is not None:
        raise error
    result: T = value
    return result
