"""Which figures a group gets, each with a caption that says how to read it and the records it came from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from memory_test.core.schema import Record
from memory_test.report import figures
from memory_test.report.frames import BASELINE, Group, headline_batch
from memory_test.report.parts import parts_of

Shelf = Literal["overview", "timeline", "batches"]

TIMELINE_CAPTION = (
    "Allocated memory through one steady step; bands are phases, the dot is the peak. All methods share the "
    "memory axis. Time is that of the memory pass, which tracing slows down: compare shapes here, durations "
    "above."
)
PEAK_CAPTION = (
    "Each bar is the peak of a step, split by what occupied memory at that instant. Blues are what any "
    "training keeps, green grows with the batch, orange to yellow is what privacy adds. At the end: the peak "
    "and its ratio to vanilla."
)


@dataclass(frozen=True, kw_only=True)
class Plate:
    """A figure ready to be shown.

    Attributes:
        name: File name without suffix.
        title: What it shows.
        caption: How to read it.
        shelf: The part of the report it belongs to.
        numbers: The records it came from, by their number in the report.
        figure: The drawing.
    """

    name: str
    title: str
    caption: str
    shelf: Shelf
    numbers: tuple[int, ...]
    figure: Figure


def plates(group: Group) -> list[Plate]:
    """Return the figures of a group, most telling first; none if nothing finished."""
    rows = group.rows
    batch = headline_batch(rows)
    if batch is None:
        return []
    predicted = rows["source"].eq("predicted").any()
    note = " Hatched or hollow: predicted, not measured." if predicted else ""
    return [
        Plate(
            name=f"{group.slug}-{plate.name}",
            title=plate.title,
            caption=plate.caption + note,
            shelf=plate.shelf,
            numbers=plate.numbers,
            figure=plate.figure,
        )
        for plate in [*_overview(rows, batch), *_timelines(rows, batch), *_other_batches(rows, batch)]
    ]


def _overview(rows: pd.DataFrame, batch: int) -> Iterator[Plate]:
    here = _numbers(rows[rows["batch_size"] == batch])
    yield _peak(rows, batch, "overview")
    if parts_of(rows[rows["batch_size"] == batch]):
        yield Plate(
            name=f"parts-b{batch}",
            title=f"Activations and clipping by part, batch {batch}",
            caption="What grows with the batch at the peak: saved activations, what is kept for clipping, per-example "
            "gradients, by the part of the model in whose forward or backward it was born. Elsewhere: between parts, "
            "and the loss.",
            shelf="overview",
            numbers=here,
            figure=figures.growing_by_part(rows, batch),
        )
    compared = rows[(rows["batch_size"] == batch) & rows["memory_ratio"].notna()]
    if compared["experiment"].ne(BASELINE).any():
        yield Plate(
            name=f"overhead-b{batch}",
            title=f"Overhead over vanilla, batch {batch}",
            caption="Memory (full colour) and time per step (pale) as multiples of ordinary training at the "
            "same batch size. A bar that ends at the line costs nothing.",
            shelf="overview",
            numbers=here,
            figure=figures.overhead(rows, batch),
        )
    if rows["batch_size"].nunique() > 1:
        yield Plate(
            name="memory-against-batch",
            title="Peak memory against batch size",
            caption="Each line is a method. The steeper it is, the more an example costs; a dotted line ends "
            "in a cross at the batch size that ran out of memory.",
            shelf="overview",
            numbers=_numbers(rows),
            figure=figures.memory_against_batch(rows),
        )
    yield from _speed(rows, batch)


def _speed(rows: pd.DataFrame, batch: int) -> Iterator[Plate]:
    good = rows[rows["status"] == "ok"]
    if good["throughput_examples_per_s"].notna().any():
        yield Plate(
            name=f"throughput-b{batch}",
            title=f"Throughput, batch {batch}",
            caption="Examples per second, from the median of the timed steps. The whisker spans the slowest "
            "to the fastest step: where whiskers overlap, methods are not told apart.",
            shelf="overview",
            numbers=_numbers(rows[rows["batch_size"] == batch]),
            figure=figures.throughput(rows, batch),
        )
    if good["step_time_s"].notna().any():
        yield Plate(
            name="pareto",
            title="Time against memory",
            caption="Each point is a method at a batch size (b); lower left is better. The grey band joins "
            "the private cells that no other private cell beats in both.",
            shelf="overview",
            numbers=_numbers(good),
            figure=figures.pareto(rows),
        )


def _timelines(rows: pd.DataFrame, batch: int) -> Iterator[Plate]:
    here = rows[(rows["batch_size"] == batch) & (rows["status"] == "ok")]
    here = here[[_has_timeline(record) for record in here["record"]]]
    top = max((max(record.timeline.allocated_bytes) for record in here["record"]), default=None)
    for row in here.to_dict("records"):
        record: Record = row["record"]
        yield Plate(
            name=f"timeline-{row['experiment']}-{row['source']}-b{batch}",
            title=f"Memory through a step: {row['label']}, batch {batch}",
            caption=TIMELINE_CAPTION,
            shelf="timeline",
            numbers=tuple(row["numbers"][:1]),
            figure=figures.phase_timeline(record, top),
        )


def _has_timeline(record: Record) -> bool:
    return record.timeline is not None and bool(record.timeline.time_s) and record.timeline.time_s[-1] > 0


def _other_batches(rows: pd.DataFrame, batch: int) -> Iterator[Plate]:
    for other in sorted({int(value) for value in rows[rows["status"] == "ok"]["batch_size"]} - {batch}):
        yield _peak(rows, other, "batches")


def _peak(rows: pd.DataFrame, batch: int, shelf: Shelf) -> Plate:
    return Plate(
        name=f"peak-b{batch}",
        title=f"Peak memory, batch {batch}",
        caption=PEAK_CAPTION,
        shelf=shelf,
        numbers=_numbers(rows[rows["batch_size"] == batch]),
        figure=figures.peak_by_method(rows, batch),
    )


def _numbers(rows: pd.DataFrame) -> tuple[int, ...]:
    return tuple(sorted({number for numbers in rows["numbers"] for number in numbers}))


def ranges(numbers: tuple[int, ...]) -> str:
    """Return numbers for people: ``1–4, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
