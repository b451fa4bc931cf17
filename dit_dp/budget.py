"""``dit-dp budget``: epsilon, noise and steps hang together; say two, and the third is found. No torch."""

import math
from dataclasses import dataclass

from dit_dp import validate
from dit_dp.console import say
from dit_dp.errors import UsageError
from dit_dp.privacy import Mechanism, PrivacyStatement, check_delta, noise_multiplier, steps_within
from dit_dp.privacy.accounting import Unit


@dataclass(frozen=True, kw_only=True)
class BudgetArgs:
    """Find the one of epsilon, noise multiplier and steps that is left out, and say what is then promised."""

    delta: float
    """Probability with which the promise may fail; well below one over the data set's size."""
    dataset_size: int
    """Privacy units in the data set."""
    epsilon: float | None = None
    """Budget."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise over the clipping norm."""
    steps: int | None = None
    """Steps of the optimizer."""
    epochs: float | None = None
    """The same as steps, in passes over the data."""
    batch_size: int | None = None
    """Expected batch; or say the sample rate."""
    sample_rate: float | None = None
    """Probability with which a unit is in a step."""
    unit: Unit = "image"
    """Whom the promise is made to."""

    def __post_init__(self) -> None:
        validate.integer("dataset_size", self.dataset_size, fix="there is no data" if self.dataset_size == 0 else None)
        _one_of(self, ("batch_size", "sample_rate"))
        if self.batch_size is not None:
            validate.integer("batch_size", self.batch_size)
            if self.batch_size > self.dataset_size:
                accepted = f"at most the data set's size, {self.dataset_size}"
                raise UsageError.for_value("batch_size", self.batch_size, accepted)
        if self.steps is not None and self.epochs is not None:
            raise UsageError("steps, epochs: got both; say one of them")
        if self.epochs is not None:
            validate.real("epochs", self.epochs, positive=True)
        known = {"epsilon": self.epsilon, "noise_multiplier": self.noise_multiplier, "steps or epochs": self.num_steps}
        missing = [name for name, value in known.items() if value is None]
        if len(missing) != 1:
            got = f"{3 - len(missing)} of them"
            raise UsageError.for_value(", ".join(known), got, "two of the three; the third is found")

    @property
    def rate(self) -> float:
        """The sample rate q."""
        if self.sample_rate is not None:
            return self.sample_rate
        assert self.batch_size is not None
        return self.batch_size / self.dataset_size

    @property
    def num_steps(self) -> int | None:
        """T, if it was given; epochs are rounded up."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs / self.rate - 1e-9)


def _one_of(args: object, names: tuple[str, str]) -> None:
    """Raise `UsageError` unless one of two arguments was given, and not both."""
    given = [name for name in names if getattr(args, name) is not None]
    if len(given) != 1:
        raise UsageError(f"{', '.join(names)}: got {'both' if given else 'neither'}; say one of them")


def solve(args: BudgetArgs) -> Mechanism:
    """Return the run that the arguments describe, with what they leave out.

    Raises:
        UsageError: A value is out of range, or no run keeps the budget.
    """
    sigma, steps = args.noise_multiplier, args.num_steps
    Mechanism(noise_multiplier=sigma or 0.0, sample_rate=args.rate, num_steps=steps or 0)
    if sigma is None:
        assert args.epsilon is not None
        assert steps is not None
        sigma = noise_multiplier(target_epsilon=args.epsilon, delta=args.delta, sample_rate=args.rate, num_steps=steps)
    elif steps is None:
        assert args.epsilon is not None
        steps = steps_within(
            target_epsilon=args.epsilon, delta=args.delta, noise_multiplier=sigma, sample_rate=args.rate
        )
        if steps == 0:
            raise UsageError.for_value("epsilon", args.epsilon, "a budget for at least one step", "or take more noise")
    return Mechanism(noise_multiplier=sigma, sample_rate=args.rate, num_steps=steps)


def run_budget(args: BudgetArgs) -> int:
    """Solve and print; returns the exit code."""
    check_delta(args.delta, args.dataset_size)
    run = solve(args)
    statement = PrivacyStatement(
        mechanisms=(run,), delta=args.delta, unit=args.unit, num_units=args.dataset_size, sampling="poisson"
    )
    say(f"noise multiplier: {run.noise_multiplier:.6g}")
    say(f"steps: {run.num_steps} ({run.num_steps * run.sample_rate:.4g} epochs)")
    say(f"sample rate: {run.sample_rate:.6g} (expected batch {run.sample_rate * args.dataset_size:.6g})")
    say(str(statement))
    return 0
