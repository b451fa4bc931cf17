"""Where memory runs out: the largest batch that fits, on the emulated runtime and by prediction."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memory_test.core.units import GIB
from memory_test.predict.cards import Card
from memory_test.predict.emulator.build import Emulator
from memory_test.predict.emulator.cases import EXPANDABLE, Case
from memory_test.predict.emulator.record import Result
from memory_test.predict.emulator.sides import CARD, Kept, emulate, predict


@dataclass(frozen=True)
class Edge:
    """A method on a card, all but the batch.

    Attributes:
        case: With any batch.
        usable_bytes: What the card leaves to the allocator.
        start: Batch to try first.
    """

    case: Case
    usable_bytes: int
    start: int

    @property
    def card(self) -> Card:
        """The card emulated elsewhere, with less memory."""
        return dataclasses.replace(CARD, memory_bytes=self.usable_bytes + CARD.context_bytes)

    def at(self, batch_size: int) -> Case:
        """Return the configuration at a batch size."""
        return dataclasses.replace(self.case, changes={**self.case.changes, "batch_size": batch_size})

    def name(self, batch_size: int) -> str:
        """Return what is tried, in words."""
        return f"{self.at(batch_size).name} in {self.usable_bytes} bytes"


def _edge(method: str, model: str, gib: int, start: int, **changes: Any) -> Edge:
    settings = {"settings": changes.pop("settings")} if "settings" in changes else {}
    named = {"model": f"DiT-{model}/2", "experiment": method, **changes}
    return Edge(Case(changes=named, **settings), gib * GIB, start)


EDGES = (
    _edge("vanilla", "S", 4, 38),
    _edge("vanilla", "S", 4, 38, settings=EXPANDABLE),
    _edge("bookkeeping", "S", 4, 37),
    _edge("ghost", "S", 4, 37),
    _edge("opacus", "S", 6, 34),
    _edge("opacus-ghost", "S", 4, 36),
    _edge("vanilla", "B", 8, 57, dtype="bf16"),
    _edge("bookkeeping", "B", 8, 41, activation_checkpointing=True),
)


def largest(fits: Callable[[int], bool], start: int) -> int:
    """Return the largest number that fits, 0 if not even 1 does; smaller ones fit as well.

    Args:
        fits: Asked about few numbers.
        start: Tried first, best near the answer.
    """
    low, high, step, at = 0, 0, 1, start
    while high != low + 1:
        if fits(at):
            low = at
        else:
            high = at
        if not high:
            at, step = low + step, 2 * step
        elif not low:
            at, step = max(1, high - step), 2 * step
        else:
            at = (low + high) // 2
    return low


def compare_edge(edge: Edge, emulator: Emulator, kept: Kept) -> Result:
    """Return both sides' largest batch of a method on a card."""

    def fits(side: str, run: Callable[[Case, Card], Result]) -> Callable[[int], bool]:
        def asked(batch_size: int) -> bool:
            name = edge.name(batch_size)
            return bool(kept.get(side, name, lambda: run(edge.at(batch_size), edge.card))["status"] == "ok")

        return asked

    predicted = largest(fits("predicted", predict), edge.start)
    emulated = largest(fits("emulated", lambda case, card: emulate(emulator, case, card)), max(1, predicted))
    return {"name": edge.case.name, "usable_bytes": edge.usable_bytes, "emulated": emulated, "predicted": predicted}
