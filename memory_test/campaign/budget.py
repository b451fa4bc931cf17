"""Wall time: what may still begin."""

import time
from collections.abc import Callable

HEADROOM = 1.25
"""A step may take so much longer than the slowest before it: batches grow."""


class Budget:
    """Wall time from now on.

    Args:
        seconds: How much.
        clock: Tells the time (s).
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self._end - self.clock())


class Pace:
    """Says of the steps of one part whether the next may begin.

    Args:
        budget: Of all parts.
        expected: Seconds a step, as long as none is known.
    """

    def __init__(self, budget: Budget, expected: float) -> None:
        self._budget, self._expected = budget, expected
        self._begun: float | None = None
        self._slowest: float | None = None

    def left(self) -> float:
        """Return the seconds that are left of all."""
        return self._budget.left()

    def begin(self) -> float | None:
        """Return how long (s) the next step may take, if there is time for it; the one before ended just now."""
        now = self._budget.clock()
        if self._begun is not None:
            self._slowest = max(now - self._begun, self._slowest or 0.0)
        expected = self._expected if self._slowest is None else HEADROOM * self._slowest
        left = self._budget.left()
        self._begun = now if left > 0 and left >= expected else None
        return None if self._begun is None else left
