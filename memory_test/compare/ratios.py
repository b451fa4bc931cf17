"""Who goes when, and what the times of a round say together. Pure functions."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import TypeVar

from memory_test.compare.schema import Spread

T = TypeVar("T")


def rotated(items: Sequence[T], by: int) -> list[T]:
    """Return the items with the first `by` moved to the end; any integer."""
    shift = by % len(items) if items else 0
    return [*items[shift:], *items[:shift]]


def paired(times: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Return median and quartiles of one contender's times over the baseline's of the same round.

    What slows the whole machine for a while slows both times of a round and leaves their ratio, where a ratio of
    two medians would compare a slow stretch of one with a quick stretch of the other.

    Args:
        times: One time a round (s).
        baseline: As many, > 0.
    """
    ratios = [own / base for own, base in zip(times, baseline, strict=True)]
    q1, _, q3 = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Spread(median=median(ratios), q1=q1, q3=q3)


def less(times: Sequence[float], parts: Sequence[float]) -> list[float]:
    """Return each time less its part."""
    return [whole - part for whole, part in zip(times, parts, strict=True)]
