"""The largest physical batch of a method on a card, and what a step of the logical batch costs."""

import dataclasses
import math
from collections.abc import Callable

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.core.units import GIB, format_bytes
from memory_test.plan.facts import MethodPlan
from memory_test.predict.affine import AffineRun
from memory_test.predict.allocator import OutOfMemoryError
from memory_test.predict.cards import Card
from memory_test.predict.predict import Imagined, imagined_run
from memory_test.predict.refusals import named
from memory_test.predict.replay import replay
from memory_test.predict.roofline import UNTIMED, Rates, phase_seconds, step_seconds

SMALL = (4, 8)
"""Batch sizes that are traced; those between and beyond follow."""

STEPS = 2
"""Traced steps: the first, and one with optimizer state."""

SHARES = (0.85, 0.75, 0.65, 0.5)
"""Budgets, of what the card leaves, that are tried where a method's own leaves too little room for fragments."""

_ONCE = ("noise", "optimizer")
"""Phases that a step goes through once, however many physical batches it takes."""

Cell = Callable[[int, int], ExperimentConfig]
"""From physical batch and accumulation to a cell."""


def plan_method(method: str, cell: Cell, logical: int, card: Card, margin: float, rates: Rates) -> MethodPlan:
    """Plan one method.

    Args:
        method: Key of `METHODS`.
        cell: Makes its cells.
        logical: Examples a step.
        card: Where.
        margin: Share of the card that stays free.
        rates: What time is counted with.
    """
    room = dataclasses.replace(card, memory_bytes=int(card.memory_bytes * (1 - margin)))
    try:
        if METHODS[method].owns_forward or METHODS[method].takes_memory_budget:
            return _in_engine(method, cell, logical, room, card, rates)
        return _by_loop(method, cell, logical, room, card, rates)
    except UsageError as error:
        return MethodPlan(method=method, status="refused", reason=str(error))


def check_own(config: ExperimentConfig, card: Card) -> None:
    """Take one imagined step of ordinary training: what fails in it is the model's mistake, and no method's.

    Raises:
        UsageError: The model, its loss or its batch is wrong, or cannot be imagined.
    """
    _imagine(config, card, Rates.ceilings(card))


def _imagine(config: ExperimentConfig, card: Card, rates: Rates) -> Imagined:
    with named(config.model_label):
        return imagined_run(config.resolve(device="cuda", num_threads=1), card, STEPS, whole=False, rates=rates)


def _reserved(run: Imagined, card: Card) -> int | None:
    """Return peak reserved memory on a card; `None` if it does not fit."""
    try:
        found = replay(run.trace, run.places, capacity_bytes=card.usable_bytes)
    except OutOfMemoryError:
        return None
    return max(reserved for _, reserved in found.peaks.values())


# --- methods that part the batch themselves ---------------------------------------------------------------------


def _in_engine(method: str, cell: Cell, logical: int, room: Card, card: Card, rates: Rates) -> MethodPlan:
    """Plan a method that takes the logical batch whole; where it plans too tightly, with a smaller budget."""
    shares: tuple[float | None, ...] = (None, *SHARES) if METHODS[method].takes_memory_budget else (None,)
    tried = []
    for share in shares:
        budget = None if share is None else round(share * room.usable_bytes / GIB, 3)
        row = _with_budget(method, dataclasses.replace(cell(logical, 1), memory_budget_gib=budget), room, card, rates)
        if row.status == "fits":
            return row
        tried.append(row)
    return tried[-1]


def _with_budget(method: str, config: ExperimentConfig, room: Card, card: Card, rates: Rates) -> MethodPlan:
    logical = config.batch_size
    try:
        run = _imagine(config, room, rates)
    except UsageError as error:
        if not str(error).startswith("memory_budget: "):
            raise
        return MethodPlan(method=method, status="too large", reason=str(error))  # even the leanest plan is
    physical = int(run.choices.get("physical_batch", 1 if method == "microbatch" else logical))
    reserved = _reserved(run, room)
    if reserved is None:
        return _too_large(method, "the logical batch, in its parts,", run, room, card)
    budget = run.choices.get("memory_budget_bytes")
    return MethodPlan(
        method=method,
        status="fits",
        physical_batch=physical,
        accumulation=-(-logical // physical),
        in_engine=True,
        peak_reserved_bytes=reserved,
        free_bytes=card.usable_bytes - reserved,
        step_seconds=step_seconds(run.trace, run.places, rates),
        memory_budget_gib=None if budget is None else math.floor(1e3 * budget / GIB) / 1e3,
        choices=run.choices,
    )


# --- methods that the loop gives physical batches ---------------------------------------------------------------


def _by_loop(method: str, cell: Cell, logical: int, room: Card, card: Card, rates: Rates) -> MethodPlan:
    """Plan a method that takes physical batches, whose sums add up."""
    parts = min(2, logical)  # with a sum held from the batch before, as all but the first have
    first, second = (min(size, logical) for size in SMALL)
    small = _imagine(cell(first, parts), room, rates)
    if _reserved(small, room) is None:
        small, first = _imagine(cell(1, parts), room, rates), 1
        if _reserved(small, room) is None:
            return _too_large(method, "one example", small, room, card)
        second = min(SMALL[0], logical)
    family = _Family(lambda batch: _imagine(cell(batch, parts), room, rates), room, {first: small})
    accumulation = -(-logical // family.largest(first, second, logical))
    reserved = None
    while reserved is None:  # a little less may take more: fragments
        physical = -(-logical // accumulation)  # no smaller last one
        parts = min(2, accumulation)
        run = family.run(physical) if parts == min(2, logical) else _imagine(cell(physical, 1), room, rates)
        reserved = _reserved(run, room)
        accumulation += reserved is None
    seconds = phase_seconds(run.trace, run.places, rates)
    once = sum(seconds.get(phase, 0.0) for phase in _ONCE)
    parts_s = sum(value for phase, value in seconds.items() if phase not in (*_ONCE, *UNTIMED))
    return MethodPlan(
        method=method,
        status="fits",
        physical_batch=physical,
        accumulation=accumulation,
        peak_reserved_bytes=reserved,
        free_bytes=card.usable_bytes - reserved,
        step_seconds=parts_s * accumulation / parts + once,
        choices=run.choices,
    )


class _Family:
    """Runs of one cell at any physical batch: from two, where sizes are all that differs, else each traced."""

    def __init__(self, trace: Callable[[int], Imagined], card: Card, known: dict[int, Imagined]) -> None:
        self._trace, self._card, self._known = trace, card, known
        self._affine: AffineRun | None = None

    def run(self, batch: int) -> Imagined:
        if batch not in self._known:
            if self._affine is not None:
                return self._affine.at(batch)
            self._known[batch] = self._trace(batch)
        return self._known[batch]

    def largest(self, first: int, second: int, most: int) -> int:
        """Return the largest batch up to `most` that fits, where `first` does."""
        if second == first:
            return first
        one, two = self.run(first), self.run(second)
        self._affine = AffineRun.of((one, two), (first, second))
        demand = {size: self._demand(size) for size in (first, second)}
        slope = max(1, (demand[second] - demand[first]) // (second - first))
        guess = first + (self._card.usable_bytes - demand[first]) // slope
        return self._search(first, most + 1, min(max(guess, first), most))

    def _demand(self, batch: int) -> int:
        run = self.run(batch)
        return max(reserved for _, reserved in replay(run.trace, run.places).peaks.values())

    def _search(self, low: int, high: int, guess: int) -> int:
        """Return the largest batch that fits, from `low`, which does, below `high`, near a guess."""
        stride = max(1, guess // 32)
        while high - low > 1:
            if _reserved(self.run(guess), self._card) is not None:
                low, guess = guess, guess + stride
            else:
                high, guess = guess, guess - stride
            stride *= 2
            if not low < guess < high:
                guess = (low + high) // 2
        return low


def _too_large(method: str, what: str, run: Imagined, room: Card, card: Card) -> MethodPlan:
    """Say by how much something does not fit, and on what card it would."""
    need = max(reserved for _, reserved in replay(run.trace, run.places).peaks.values())
    missing = need - room.usable_bytes
    total = (need + room.context_bytes) * card.memory_bytes / room.memory_bytes
    return MethodPlan(
        method=method,
        status="too large",
        reason=(
            f"{what} takes {format_bytes(need)} reserved, {format_bytes(max(0, missing))} more than there is; "
            f"a card of {format_bytes(total)} would do"
        ),
        peak_reserved_bytes=need,
    )
