"""Largest batches: predicted without a GPU, then tried at the predicted number and one above.

Memory is capped by the allocator's own limit, so that neither the context nor other processes move the edge.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from memory_test.campaign.budget import Pace
from memory_test.campaign.campaign import Outcome, Site
from memory_test.campaign.cases import Result, Trial, run_trials
from memory_test.campaign.parts import Part
from memory_test.core.units import GIB
from memory_test.predict.cards import CARDS, Card
from memory_test.predict.emulator.cases import Case, allocator_options
from memory_test.predict.emulator.edges import EDGES, Edge, largest
from memory_test.predict.emulator.sides import Kept, predict


def _large(method: str, start: int, **changes: object) -> Edge:
    """An edge near the whole of a card of 80 GB."""
    return Edge(Case(changes={"model": "DiT-XL/2", "experiment": method, "dtype": "bf16", **changes}), 72 * GIB, start)


ALL_EDGES: tuple[Edge, ...] = (
    *EDGES,
    _large("vanilla", 160),
    _large("bookkeeping", 150),
    _large("ghost", 150),
    _large("flash_clip_bk", 150),
    _large("vanilla", 40, image_size=512),
)
FOLDER = "edges"


def largest_batch(edge: Edge, card: Card, predictions: Kept) -> int:
    """Return the largest batch that is predicted to fit; predictions are kept.

    Args:
        edge: A method and how much memory there is.
        card: The GPU, whatever memory it has.
        predictions: Where they are kept.
    """
    capped = dataclasses.replace(card, memory_bytes=edge.usable_bytes + card.context_bytes)

    def fits(batch_size: int) -> bool:
        name = f"{edge.name(batch_size)} on {card.name}"
        return bool(predictions.get("predicted", name, lambda: predict(edge.at(batch_size), capped))["status"] == "ok")

    return largest(fits, edge.start)


def _predictions(site: Site) -> Kept:
    return Kept(site.folder(FOLDER) / "predicted")


def run_predictions(part: Part, site: Site, pace: Pace) -> Outcome:
    """Predict the largest batches."""
    predictions, card = _predictions(site), CARDS[site.card]
    for count, edge in enumerate(ALL_EDGES):
        if pace.begin() is None:
            return Outcome(done=count, left=len(ALL_EDGES) - count)
        found = largest_batch(edge, card, predictions)
        site.say(f"{part.name}: {edge.case.name} in {edge.usable_bytes / GIB:g} GiB: at most {found} predicted")
    return Outcome(done=len(ALL_EDGES), left=0)


def trials_of(edge: Edge, predicted: int) -> Iterator[Trial]:
    """Yield the batch that should fit, and the one that should not."""
    for batch_size in (predicted, predicted + 1):
        if batch_size:
            yield Trial(edge.at(batch_size), edge.usable_bytes)


def tried(edge: Edge, measured: Sequence[Result]) -> dict[int, str]:
    """Return how batches of an edge ended, of all results; empty if none was tried."""
    wanted = {**edge.case.changes, "batch_size": None}
    options = allocator_options(edge.case.settings)
    return {
        result["changes"]["batch_size"]: result["status"]
        for result in measured
        if {**result["changes"], "batch_size": None} == wanted
        and (result["usable_bytes"], result["allocator"]["options"]) == (edge.usable_bytes, options)
    }


def run_edges(part: Part, site: Site, pace: Pace) -> Outcome:
    """Try predicted edges; what was not predicted beforehand is predicted now."""
    predictions, card = _predictions(site), CARDS[site.card]
    done = failed = 0
    for edge in ALL_EDGES:
        if pace.left() < part.step_seconds:
            break
        found = run_trials(list(trials_of(edge, largest_batch(edge, card, predictions))), part, site, pace)
        done, failed = done + found.done, failed + found.failed
        if found.left:
            break
    return Outcome(done=done, left=part.steps - done, failed=failed)
