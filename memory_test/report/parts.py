"""Where in the model the memory is that grows with the batch: by part, as records hold it."""

from collections.abc import Collection

import pandas as pd

from memory_test.core.breakdown import ELSEWHERE
from memory_test.core.schema import Record
from memory_test.core.units import format_bytes
from memory_test.report.tables import markdown_table

CLIPPING = ("per_example_gradients", "kept_for_clipping")
GROWING = ("saved_activations", *CLIPPING)
"""Categories that grow with the batch: what autograd keeps, and what clipping does."""

READING = (
    "Saved activations at the peak, by the part of the model in whose forward they were born, and, after the plus, "
    "what is kept for clipping (per-example gradients too). Elsewhere: between parts, and the loss."
)


def parts_of(rows: pd.DataFrame) -> list[str]:
    """Return the parts that records of finished rows know, as they come, `ELSEWHERE` last; none of a model of one."""
    met = dict.fromkeys(part for record in _finished(rows) for part in record.breakdown_by_part)
    named = [part for part in met if part != ELSEWHERE]
    return [*named, ELSEWHERE] if len(named) > 1 else []


def part_bytes(record: Record, part: str, categories: Collection[str] = GROWING) -> int:
    """Return what a part holds at the peak in some categories."""
    sizes = record.breakdown_by_part.get(part, {})
    return sum(size for category, size in sizes.items() if category in categories)


def part_table(rows: pd.DataFrame) -> str | None:
    """Return a Markdown table of methods against parts; `None` where no record knows several."""
    parts = parts_of(rows)
    if not parts:
        return None
    lines = []
    for row in rows.sort_values("batch_size", kind="stable").to_dict("records"):
        record: Record = row["record"]
        if row["status"] == "ok" and record.breakdown_by_part:
            cells = [_cell(record, part) for part in parts]
            lines.append([str(row["label"]), str(row["batch_size"]), *cells])
    return markdown_table(("method", "batch", *parts), lines, (0,))


def _cell(record: Record, part: str) -> str:
    saved, kept = (part_bytes(record, part, names) for names in (GROWING[:1], CLIPPING))
    return format_bytes(saved) + (f" + {format_bytes(kept)}" if kept else "")


def _finished(rows: pd.DataFrame) -> list[Record]:
    return [record for record in rows[rows["status"] == "ok"]["record"] if record.breakdown_by_part]
