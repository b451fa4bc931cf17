"""Checks shared by every configuration class. No torch."""

import math
from collections.abc import Iterable

from dit_dp.errors import UsageError


def one_of(name: str, value: str, accepted: Iterable[str], fix: str | None = None) -> None:
    """Raise `UsageError` unless `value` is one of `accepted`."""
    choices = list(accepted)
    if value not in choices:
        raise UsageError.for_value(name, value, choices, fix)


def integer(name: str, value: object, minimum: int = 1, fix: str | None = None) -> None:
    """Raise `UsageError` unless `value` is an int (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UsageError.for_value(name, value, f"an integer >= {minimum}", fix)


def real(name: str, value: object, *, positive: bool, fix: str | None = None) -> None:
    """Raise `UsageError` unless `value` is a finite number, > 0 if `positive` else >= 0."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        if isinstance(value, str) and fix is None:
            fix = "it was read as text: in YAML write 1.0e-4, not 1e-4"
        raise UsageError.for_value(name, value, f"a finite number {'> 0' if positive else '>= 0'}", fix)


def at_least(name: str, value: object, minimum: float) -> None:
    """Raise `UsageError` unless `value` is a number of at least `minimum`; infinity is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= minimum:
        raise UsageError.for_value(name, value, f"a number >= {minimum}")


def divisible(name: str, value: int, divisor: int, fix: str) -> None:
    """Raise `UsageError` unless `divisor` divides `value`."""
    if value % divisor:
        raise UsageError.for_value(name, value, f"a multiple of {divisor}", fix)
