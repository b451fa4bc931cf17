"""The epsilon of a run for the lines of its log, at little cost: an accountant takes up to a second. No torch.

**Guarantees**: what is returned is the epsilon of all that is charged, or of that and of steps to come, which is a
bound, since no step takes back what another released; of a run's last line it is the first.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_dp.errors import UsageError
from dit_dp.privacy import Mechanism, epsilon_of

log = logging.getLogger(__name__)

SHARE = 0.01
"""Of a run's time that the accountant takes for the log, after the first two lines."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What was spent, or a bound.

    Attributes:
        epsilon: Of so many charges, at the run's delta; `None`: the accountant takes too long.
        num_charges: Those of the run so far, or more: then epsilon is a bound.
    """

    epsilon: float | None
    num_charges: int


class Price:
    """Asks the accountant, ahead for as many steps as it takes until it may be asked again.

    Args:
        delta: In (0, 1).
        account: Returns the epsilon of mechanisms at delta.
        clock: In seconds.
    """

    def __init__(
        self,
        delta: float,
        account: Callable[[Sequence[Mechanism], float], float] = epsilon_of,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._delta, self._account, self._clock = delta, account, clock
        self._known: Spent | None = None
        self._asked_at = self._cost_s = 0.0
        self._asked_after = 0

    def at_most(self, charged: Sequence[Mechanism], step: Mechanism, left: int) -> Spent:
        """Return what was spent, or what will have been after up to `left` further steps.

        Args:
            charged: All of it.
            step: What another step is.
            left: How many may still come; 0: what is returned is no mere bound.
        """
        count = _count(charged)
        if self._known is None or self._known.num_charges < count:
            ahead = min(left, self._steps_between(count))
            self._ask([*charged, replace(step, num_steps=ahead)], count)
        assert self._known is not None
        return self._known if left else self.exactly(charged)

    def exactly(self, charged: Sequence[Mechanism]) -> Spent:
        """Return what was spent."""
        count = _count(charged)
        if self._known is None or self._known.num_charges != count:
            self._ask(charged, count)
        assert self._known is not None
        return self._known

    def _steps_between(self, count: int) -> int:
        """Return the steps that take so long that the accountant has its share of the time; 0 if it was never asked."""
        step_time_s = (self._clock() - self._asked_at) / max(1, count - self._asked_after)
        return int(self._cost_s / SHARE / step_time_s) if step_time_s > 0 else 0

    def _ask(self, mechanisms: Sequence[Mechanism], count: int) -> None:
        began, epsilon = self._clock(), None
        try:
            epsilon = self._account(mechanisms, self._delta)
        except UsageError as error:  # what is charged is charged; its price can be asked for later
            log.warning("epsilon is left out: %s", error)
        self._known = Spent(epsilon=epsilon, num_charges=_count(mechanisms))
        self._asked_at, self._asked_after = self._clock(), count
        self._cost_s = self._asked_at - began


def _count(mechanisms: Sequence[Mechanism]) -> int:
    return sum(mechanism.num_steps for mechanism in mechanisms)


def is_bound(values: Mapping[str, Any]) -> bool:
    """Return whether the epsilon among a step's logged values is a bound, that of more steps than were charged."""
    return bool(values.get("epsilon_charges", 0) > values.get("num_charges", 0))
