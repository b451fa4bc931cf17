"""A group as text: the key finding, the table of methods, failures, environment and protocol."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dit_dp.clipping.registry import METHODS
from memory_test.core.schema import Environment
from memory_test.core.units import format_bytes, format_seconds
from memory_test.report.frames import (
    BASELINE,
    Group,
    environment_of,
    failures,
    groups,
    headline_batch,
    measured_if_any,
)
from memory_test.report.parts import READING as PARTS_READING
from memory_test.report.parts import part_table
from memory_test.report.tables import escape, markdown_table, plain_table

HEADINGS = ("method", "batch", "peak", "× vanilla", "step", "× vanilla", "examples/s", "status")
LEFT = (0, 7)
"""Columns aligned to the left."""
SPREAD_NOTE = (
    "Examples/s: median over all timed steps ± half the interquartile range. "
    "× vanilla: ratio to ordinary training of the same group and batch size."
)
NO_VANILLA = "Without a vanilla record of the same batch size there is nothing to compare with: no ratio is given."
_SPOKEN = {
    "vanilla": "ordinary training",
    "ghost": "ghost clipping",
    "bookkeeping": "book-keeping",
    "flash_clip": "flash clipping",
    "flash_clip_bk": "one-pass flash clipping",
    "microbatch": "the loop over examples",
    "opacus": "Opacus hooks",
    "opacus-functorch": "Opacus functorch",
    "opacus-ew": "Opacus ExpandedWeights",
    "opacus-ghost": "Opacus ghost clipping",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the summary table, as text in the order of `HEADINGS`."""

    values: tuple[str, ...]
    numbers: tuple[int, ...]


def cells(rows: pd.DataFrame) -> list[Cell]:
    """Return the summary table's rows, by batch size and then by method."""
    ordered = rows.sort_values("batch_size", kind="stable")
    return [_cell(row) for row in ordered.to_dict("records")]


def _cell(row: Mapping[Hashable, Any]) -> Cell:
    ok, baseline = row["status"] == "ok", row["experiment"] == BASELINE
    peak = None if pd.isna(row["peak_allocated_bytes"]) else int(row["peak_allocated_bytes"])
    step = None if pd.isna(row["step_time_s"]) else float(row["step_time_s"])
    values = (
        str(row["label"]),
        str(row["batch_size"]),
        format_bytes(peak),
        "1" if ok and baseline else _ratio(row["memory_ratio"]),
        format_seconds(step),
        "1" if ok and baseline and step is not None else _ratio(row["time_ratio"]),
        _rate(row),
        str(row["status"]),
    )
    return Cell(
        values=values,
        numbers=tuple(row["numbers"]),
    )


def _ratio(value: float) -> str:
    return "—" if pd.isna(value) else f"{value:.2f}"


def _rate(row: Mapping[Hashable, Any]) -> str:
    rate = row["throughput_examples_per_s"]
    if pd.isna(rate):
        return "—"
    if pd.isna(row["step_time_q1_s"]):
        return f"{rate:.3g}"
    half = (row["batch_size"] / row["step_time_q1_s"] - row["batch_size"] / row["step_time_q3_s"]) / 2
    digits = 1 if half <= 0 else max(0, -math.floor(math.log10(half)))
    return f"{rate:.{digits}f} ± {half:.{digits}f}"


def key_finding(rows: pd.DataFrame) -> str:
    """Return one sentence on what privacy costs in a group, at the batch size that most methods finished."""
    batch = headline_batch(rows)
    if batch is None:
        counts = ", ".join(f"{count} × {status}" for status, count in rows["status"].value_counts().items())
        return f"No cell finished ({counts}), so there is nothing to compare."
    here = rows[rows["batch_size"] == batch]
    good = measured_if_any(here[here["status"] == "ok"])
    wanted = [name for name in _SPOKEN if name != BASELINE] + [n for n in METHODS if n not in _SPOKEN]
    told = good[good["experiment"].isin(wanted)]
    with_ratio = told[told["memory_ratio"].notna()]
    lost = [spoken(name) for name in here[here["status"] == "oom"]["experiment"]]
    if len(with_ratio):
        first, *others = _leading(with_ratio)
        text = "; ".join([_statement(first, batch), *(_clause(row) for row in others)])
    else:
        best = good.sort_values("peak_allocated_bytes", kind="stable").iloc[0]
        size = format_bytes(int(best["peak_allocated_bytes"]))
        text = f"{spoken(best['experiment'])} {_verb(best)} {size} at batch {batch}"
        text += "" if best["experiment"] == BASELINE else "; no ratio without vanilla"
    if lost:
        text += f"; {', '.join(lost)} did not fit"
    return text[0].upper() + text[1:] + "."


def _leading(rows: pd.DataFrame) -> list[Mapping[Hashable, Any]]:
    """Return at most three methods to name: our best, then Opacus's default, then the leanest other peer."""
    ours = [name for name in ("bookkeeping", "ghost") if name in set(rows["experiment"])]
    order = {**dict.fromkeys(ours[:1], 0), "opacus": 1}
    peers = {name for name, method in METHODS.items() if method.peer}
    ranked = rows.assign(_rank=[order.get(name, 2 if name in peers else 3) for name in rows["experiment"]])
    ranked = ranked.sort_values(["_rank", "peak_allocated_bytes"], kind="stable")
    return [dict(row) for row in ranked.head(3).to_dict("records")]


def _verb(row: Mapping[Hashable, Any] | pd.Series) -> str:
    return "is predicted to take" if row["source"] == "predicted" else "takes"


def _statement(row: Mapping[Hashable, Any], batch: int) -> str:
    time = "" if pd.isna(row["time_ratio"]) else f" and {row['time_ratio']:.2f}× the time"
    memory = f"{row['memory_ratio']:.2f}× the memory"
    return f"{spoken(row['experiment'])} {_verb(row)} {memory}{time} of ordinary training at batch {batch}"


def _clause(row: Mapping[Hashable, Any]) -> str:
    mark = " (predicted)" if row["source"] == "predicted" else ""
    time = "" if pd.isna(row["time_ratio"]) else f" and {row['time_ratio']:.2f}×"
    return f"{spoken(row['experiment'])} {row['memory_ratio']:.2f}×{time}{mark}"


def spoken(experiment: str) -> str:
    """Return a method's name for a sentence."""
    return _SPOKEN.get(experiment, experiment)


def reach(rows: pd.DataFrame) -> str | None:
    """Return a sentence on the largest batch each method finished, where memory set an edge."""
    if not rows["status"].eq("oom").any():
        return None
    good = rows[(rows["status"] == "ok") & (rows["source"] == "measured")]
    largest = good.groupby("experiment", sort=False)["batch_size"].max()
    said = ", ".join(f"{spoken(str(name))} {batch}" for name, batch in largest.items())
    return f"Largest batch that ran: {said}." if said else None


def environment_line(environment: Environment | None) -> str:
    """Return where the numbers come from, in one line."""
    if environment is None:
        return "The records name no environment."
    parts = [f"{environment.device_name} ({format_bytes(environment.device_memory_bytes)})"]
    if environment.driver_version:
        parts.append(f"driver {environment.driver_version}")
    if environment.cuda_version:
        parts.append(f"CUDA {environment.cuda_version}")
    parts += [f"torch {environment.torch_version}", f"Python {environment.python_version}"]
    parts += [f"{name} {version}" for name, version in sorted(environment.packages.items())]
    if environment.device_type == "cuda":
        parts.append(f"host {environment.cpu_model}, {environment.num_cpus} CPUs")
    else:
        parts.append(f"{environment.num_cpus} CPUs")
    parts += [f"{name}={value}" for name, value in sorted(environment.allocator.items())]
    if environment.commit:
        parts.append(f"commit {environment.commit[:12]}{' with local changes' if environment.dirty else ''}")
    return ", ".join(parts)


def protocol_line(group: Group) -> str:
    """Return how a group was measured, in one line."""
    said = {name: " or ".join(f"{value:g}" for value in values) for name, values in group.protocol.items()}
    return (
        "Every cell ran in a process of its own, memory and time in separate passes of the same loop. "
        f"Warm-up steps after the first: {said['warmup']}; timed steps: {said['num_iter']}; "
        f"processes per cell: {said['repeats']}; seed: {said['seed']}. Peak: the allocator's, of the steady "
        "steps after the first, the largest over all processes."
    )


def failure_lines(frame: pd.DataFrame) -> list[str]:
    """Return one line per record that did not finish: what, where, why."""
    lines = []
    for row in failures(frame).to_dict("records"):
        where = f" in {row['phase']}" if row["phase"] else ""
        sizes = ""
        if not pd.isna(row["requested_bytes"]):
            sizes = f"; asked for {format_bytes(int(row['requested_bytes']))}"
            if not pd.isna(row["free_bytes"]):
                sizes += f", {format_bytes(int(row['free_bytes']))} free"
        name = f"{row['experiment']}, batch {row['batch_size']}"
        lines.append(f"{name}: {row['status']}{where}: {row['reason']}{sizes}")
    return lines


def markdown_report(frame: pd.DataFrame) -> str:
    """Return the report as Markdown.

    Args:
        frame: What `frames.load_frame` returned.
    """
    parts = ["# Memory report"]
    for group in groups(frame):
        parts += [f"## {escape(group.title)}", f"**{escape(key_finding(group.rows))}**"]
        further = reach(group.rows)
        parts += [further] if further else []
        parts.append(_table(cells(group.rows)))
        parts.append(SPREAD_NOTE if group.rows["memory_ratio"].notna().any() else NO_VANILLA)
        table = part_table(group.rows)
        parts += [] if table is None else ["### By part of the model", table, PARTS_READING]
        key = group.rows["group"].iloc[0]
        lost = [f"- {escape(line)}" for line in failure_lines(frame[frame["group"] == key])]
        parts += ["### Not finished", "\n".join(lost)] if lost else []
        parts += ["### Protocol", escape(protocol_line(group))]
    parts += ["## Environment", escape(environment_line(environment_of(frame)))]
    parts.append(f"From {len(frame)} records, schema {frame['record'].iloc[0].schema_version}.")
    return "\n\n".join(parts) + "\n"


def excerpt(frame: pd.DataFrame) -> str:
    """Return the first group's finding, its table at the headline batch and the environment, for a README."""
    group = groups(frame)[0]
    batch = headline_batch(group.rows)
    rows = group.rows if batch is None else group.rows[group.rows["batch_size"] == batch]
    parts = [
        f"**{escape(key_finding(group.rows))}**",
        f"{escape(group.title)}:",
        _table(cells(rows)),
        f"{SPREAD_NOTE} {escape(protocol_line(group))}",
        f"Measured on {escape(environment_line(environment_of(frame)))}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Cell]) -> str:
    return markdown_table(HEADINGS, [row.values for row in rows], LEFT)


def terminal_table(frame: pd.DataFrame) -> str:
    """Return the summary of every group as aligned plain text, for a terminal."""
    blocks = []
    for group in groups(frame):
        table = plain_table(HEADINGS, [cell.values for cell in cells(group.rows)], LEFT)
        blocks.append("\n".join([group.title, "", table, "", key_finding(group.rows)]))
    return "\n\n".join(blocks) + "\n"
