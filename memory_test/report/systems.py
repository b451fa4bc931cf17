"""Every system of a sweep side by side: what each method costs on it, and where its activations are."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dit_dp.clipping.registry import METHODS
from memory_test.core.breakdown import ELSEWHERE
from memory_test.core.schema import Record
from memory_test.core.units import format_bytes
from memory_test.report.frames import BASELINE, Group, environment_of, groups, headline_batch
from memory_test.report.markdown import environment_line
from memory_test.report.parts import part_bytes
from memory_test.report.tables import escape, markdown_table

COSTS_READING = (
    "Methods: peak memory over ordinary training's and, after the slash, time. Trains: what does, and how many of the "
    "parameters. Saved activations: of ordinary training at its peak, by the part of the model that they were born in; "
    "none where the peak is in the optimizer's step."
)
SAVED = ("saved_activations",)
_ORDER = ("dit", "x2", "set", "ddt", "panda")


def systems_page(frame: pd.DataFrame) -> str:
    """Return two Markdown tables, costs by method and activations by part, and where they were measured.

    Args:
        frame: What `frames.load_frame` returned.
    """
    found = sorted(groups(frame), key=_place)
    methods = [name for name in METHODS if name != BASELINE and any(_row(group, name) is not None for group in found)]
    head = ("system", "trains", "batch", "ordinary training", *methods)
    costs = [[*_said(group), _peak(group), *(_ratios(group, name) for name in methods)] for group in found]
    parts = [[*_said(group)[:2], *_parts(group), _share_of_full(group, found)] for group in found]
    done = "Predicted for" if frame["source"].eq("predicted").all() else "Measured on"
    return "\n\n".join(
        [
            markdown_table(head, costs, (0, 1)),
            markdown_table(
                ("system", "trains", "saved activations", "by part", "of training in full"), parts, (0, 1, 3)
            ),
            f"{COSTS_READING} {done} {escape(environment_line(environment_of(frame)))}.\n",
        ]
    )


def _place(group: Group) -> tuple[int, str, str]:
    workload = str(group.config.get("workload"))
    return _ORDER.index(workload) if workload in _ORDER else len(_ORDER), *_said(group)[:2]


def _said(group: Group) -> tuple[str, str, str]:
    """Return the system, what trains of it, and the batch."""
    config, row = group.config, _row(group, BASELINE) or group.rows.iloc[0]
    fused = " fused after every block" if config.get("model_options.x2_fuse_every") == 1 else ""
    rows = config.get("rows_per_unit")
    batch = f"{headline_batch(group.rows)}" + (f" × {rows} rows" if rows not in (None, 1) else "")
    name = f"{config['model']}, T = {config['num_tokens']}{fused}"
    choices: Mapping[str, Any] = row["record"].choices
    counts = [choices.get(f"num_{which}parameters") for which in ("trainable_", "")]
    trains = " of ".join(f"{count / 1e6:.2f} M" for count in counts if count is not None)
    return name, f"{config['train']}: {trains}", batch


def _row(group: Group, method: str) -> dict[str, Any] | None:
    """Return a method's row at the batch size that most finished, if it finished."""
    rows = group.rows
    here = rows[
        (rows["batch_size"] == headline_batch(rows)) & (rows["experiment"] == method) & (rows["status"] == "ok")
    ]
    return {str(name): value for name, value in here.iloc[0].items()} if len(here) else None


def _peak(group: Group) -> str:
    row = _row(group, BASELINE)
    return "—" if row is None else format_bytes(int(row["peak_allocated_bytes"]))


def _ratios(group: Group, method: str) -> str:
    """Return memory and time over ordinary training's."""
    row = _row(group, method)
    if row is None or pd.isna(row["memory_ratio"]):
        return "—"
    time = "" if pd.isna(row["time_ratio"]) else f" / {row['time_ratio']:.2f}"
    return f"{row['memory_ratio']:.2f}{time}"


def _parts(group: Group) -> tuple[str, str]:
    """Return what ordinary training saves, and how much of it each part does."""
    sizes = _saved(group)
    total = sum(sizes.values())
    if not total:
        return "—", "—"
    ordered = sorted(sizes, key=lambda part: (part == ELSEWHERE, -sizes[part]))
    return format_bytes(total), ", ".join(f"{part} {sizes[part] / total:.0%}" for part in ordered)


def _saved(group: Group) -> dict[str, int]:
    """Return what ordinary training saves by part; nothing where it did not finish."""
    row = _row(group, BASELINE)
    if row is None:
        return {}
    record: Record = row["record"]
    sizes = {part: part_bytes(record, part, SAVED) for part in record.breakdown_by_part}
    return {part: size for part, size in sizes.items() if size}


def _share_of_full(group: Group, others: Iterable[Group]) -> str:
    """Return what is saved over what training everything saves, of the same model at the same batch."""
    own = sum(_saved(group).values())
    for other in others:
        alike = all(other.config.get(name) == group.config.get(name) for name in ("workload", "model", "image_size"))
        full = sum(_saved(other).values())
        if alike and other.config.get("train") == "full" and headline_batch(other.rows) == headline_batch(group.rows):
            return f"{own / full:.2f}" if own and full else "—"
    return "—"


def naive_attention_bytes(naive: Record, fused: Record) -> float:
    """Return what attention saves more where it keeps its matrices, bytes by example, layer and matrix.

    Args:
        naive: Prediction of ordinary training with plain products for attention.
        fused: The same with a fused kernel.
    """
    config = naive.config_resolved
    saved = [sum(part_bytes(record, part, SAVED) for part in record.breakdown_by_part) for record in (naive, fused)]
    cells: int = config["batch_size"] * config["depth"]
    return (saved[0] - saved[1]) / cells
