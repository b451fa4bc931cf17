"""What may be said of a run's privacy, never an epsilon alone."""

import functools
import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

from dit_dp import validate
from dit_dp.privacy.accounting import (
    ADJACENCY,
    SAMPLINGS,
    UNITS,
    Mechanism,
    Sampling,
    Unit,
    check_delta,
    epsilon_of,
    merged,
)

_FOUR_DIGITS = Context(prec=4, rounding=ROUND_CEILING)


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """A guarantee with everything that it means nothing without; `str` of it is one line.

    Attributes:
        mechanisms: What is released.
        delta: In (0, 1).
        unit: Whom the promise is made to.
        num_units: N.
        sampling: ``shuffled`` stands for fixed batches, for which no epsilon is claimed.
        adjacency: Which data sets are neighbours.

    Raises:
        UsageError: A value is out of range.
    """

    mechanisms: tuple[Mechanism, ...]
    delta: float
    unit: Unit
    num_units: int
    sampling: Sampling = "poisson"
    adjacency: str = ADJACENCY

    def __post_init__(self) -> None:
        check_delta(self.delta)
        validate.one_of("unit", self.unit, UNITS)
        validate.one_of("sampling", self.sampling, SAMPLINGS)
        validate.one_of("adjacency", self.adjacency, (ADJACENCY,))
        validate.integer("num_units", self.num_units)

    @functools.cached_property
    def epsilon(self) -> float:
        """By privacy loss distributions; infinite without noise, and where none is claimed."""
        return math.inf if self.sampling != "poisson" else epsilon_of(self.mechanisms, self.delta)

    @property
    def headline(self) -> str:
        """The claim: epsilon, or why there is none."""
        if any(m.noise_multiplier == 0 and m.num_steps for m in self.mechanisms):
            return "no privacy: the noise multiplier is 0"
        if self.sampling != "poisson":
            return "fixed batches: no epsilon is claimed"
        return f"epsilon {rounded_up(self.epsilon)}"

    def __str__(self) -> str:
        """Return the claim with delta, unit, adjacency, sampling and noise."""
        useless = ", which promises nothing: it is not below 1/N" if self.delta * self.num_units >= 1 else ""
        parts = [
            f"{self.headline}, delta {self.delta:g}{useless}",
            f"unit: {self.unit}, {self.num_units} of them",
            f"neighbours: {self.adjacency}",
            f"sampling: {'Poisson' if self.sampling == 'poisson' else 'fixed batches of a permutation'}",
            *(_describe(mechanism) for mechanism in merged(self.mechanisms) or self.mechanisms),
        ]
        return "; ".join(parts)


def rounded_up(epsilon: float) -> str:
    """Return an epsilon with four digits, which are never less than it (by more than its own rounding)."""
    return f"{float(_FOUR_DIGITS.create_decimal_from_float(epsilon * (1 - 1e-12))):.4g}"


def _describe(mechanism: Mechanism) -> str:
    return (
        f"{mechanism.num_steps} steps at rate {mechanism.sample_rate:.6g} "
        f"with noise multiplier {mechanism.noise_multiplier:.6g}"
    )
