"""Figures of one comparison group, each a `matplotlib.figure.Figure` without global state.

Every function takes `Group.rows` (see `frames.summarise`). One figure is one panel: a page puts several side
by side, a phone one below the other. Predicted rows are hatched or hollow and say so in their label.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memory_test.core.breakdown import ELSEWHERE
from memory_test.core.schema import BREAKDOWN, Record
from memory_test.core.units import format_bytes
from memory_test.report.frames import BASELINE, measured_if_any
from memory_test.report.palette import (
    CATEGORY_COLORS,
    CATEGORY_NAMES,
    INK,
    MUTED,
    PART_COLORS,
    RC,
    SURFACE,
    method_color,
)
from memory_test.report.panels import (
    STATUS_TEXT,
    TIGHT,
    batch_axis,
    cells_at,
    draw_bands,
    duration_unit,
    end_label,
    is_private,
    line_style,
    mark_crosses,
    memory_limit,
    method_axis,
    note,
    panel,
    peak_text,
    right_labels,
    size_unit,
    thin,
)
from memory_test.report.parts import part_bytes, parts_of

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under this package's settings and leave the global ones alone."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(RC):
            figure = draw(*args, **kwargs)
            figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
            return figure

    return wrapper


@_styled
def peak_by_method(rows: pd.DataFrame, batch_size: int) -> Figure:
    """Draw the peak of every method at a batch size, stacked by category, with what failed named."""
    cells = cells_at(rows, batch_size)
    size, unit = size_unit(cells["peak_allocated_bytes"])
    figure, axes = panel(f"Peak memory, batch {batch_size}", 100 + 29 * len(cells) + 48)
    met: list[str] = []
    for place, cell in enumerate(cells.to_dict("records")):
        hatch = "////" if cell["source"] == "predicted" else None
        left = 0.0
        for name in BREAKDOWN:
            value = cell[f"breakdown_{name}_bytes"]
            if cell["status"] != "ok" or pd.isna(value) or value <= 0:
                continue
            met.append(name)
            width = float(value) / size
            pattern = "xxxx" if name == "unattributed" else hatch
            style: dict[str, Any] = {"color": CATEGORY_COLORS[name], "edgecolor": SURFACE, "linewidth": 0.6}
            axes.barh(place, width, left=left, height=0.66, hatch=pattern, **style)
            left += width
        if cell["status"] == "ok" and not left:
            left = float(cell["peak_allocated_bytes"]) / size
            axes.barh(place, left, height=0.66, color=CATEGORY_COLORS["other"], hatch=hatch)
        end_label(axes, place, left, peak_text(cell))
    method_axis(axes, cells)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.62 * (axes.dataLim.x1 if cells["status"].eq("ok").any() else 1))
    handles = [
        Patch(facecolor=CATEGORY_COLORS[name], label=CATEGORY_NAMES[name], edgecolor=SURFACE)
        for name in BREAKDOWN
        if name in met
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=0.9, **TIGHT)
    return figure


@_styled
def growing_by_part(rows: pd.DataFrame, batch_size: int) -> Figure:
    """Draw what grows with the batch at every method's peak, stacked by part of the model."""
    cells = cells_at(rows, batch_size)
    parts = parts_of(cells)
    totals = [sum(part_bytes(record, part) for part in parts) for record in cells["record"]]
    size, unit = size_unit(totals)
    figure, axes = panel(f"Activations and clipping by part, batch {batch_size}", 100 + 29 * len(cells) + 30)
    colors = {part: PART_COLORS[index % len(PART_COLORS)] for index, part in enumerate(parts)}
    colors[ELSEWHERE] = CATEGORY_COLORS["other"]
    for place, cell in enumerate(cells.to_dict("records")):
        left = 0.0
        hatch = "////" if cell["source"] == "predicted" else None
        for part in parts:
            width = part_bytes(cell["record"], part) / size
            style: dict[str, Any] = {"color": colors[part], "edgecolor": SURFACE, "linewidth": 0.6}
            axes.barh(place, width, left=left, height=0.66, hatch=hatch, **style)
            left += width
        finished = cell["status"] == "ok"
        end_label(axes, place, left, format_bytes(totals[place]) if finished else STATUS_TEXT.get(cell["status"], ""))
    method_axis(axes, cells)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.45 * axes.dataLim.x1)
    handles = [Patch(facecolor=colors[part], label=part, edgecolor=SURFACE) for part in parts]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, handlelength=0.9, **TIGHT)
    return figure


@_styled
def overhead(rows: pd.DataFrame, batch_size: int) -> Figure:
    """Draw memory and time of every method at a batch size as multiples of vanilla's."""
    cells = cells_at(rows, batch_size)
    cells = cells[cells["experiment"] != BASELINE].reset_index(drop=True)
    figure, axes = panel(f"Overhead over vanilla, batch {batch_size}", 90 + 36 * len(cells))
    axes.axvline(1, color=MUTED, linewidth=1.2)
    for place, cell in enumerate(cells.to_dict("records")):
        color, predicted = method_color(cell["experiment"]), cell["source"] == "predicted"
        for shift, name, alpha in ((-0.19, "memory_ratio", 1.0), (0.19, "time_ratio", 0.5)):
            ratio = cell[name]
            if pd.isna(ratio):
                continue
            style: dict[str, Any] = {"color": color, "alpha": alpha, "hatch": "////" if predicted else None}
            axes.barh(place + shift, ratio, height=0.34, edgecolor=SURFACE, linewidth=0.6, **style)
            what = "memory" if name == "memory_ratio" else "time"
            end_label(axes, place + shift, ratio, f"{ratio:.2f}× {what}", size=10.5)
        if pd.isna(cell["memory_ratio"]):
            end_label(axes, place, 0, STATUS_TEXT.get(cell["status"], "no vanilla to compare with"))
    method_axis(axes, cells)
    axes.set_xlim(0, max(1.2, 1.42 * axes.dataLim.x1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("multiple of ordinary training (line: 1×)")
    return figure


@_styled
def memory_against_batch(rows: pd.DataFrame) -> Figure:
    """Draw peak memory against batch size, one line a method, crosses where memory ran out."""
    size, unit = size_unit(rows["peak_allocated_bytes"])
    figure, axes = panel("Peak memory against batch size", 270)
    limit = memory_limit(rows)
    top = float(rows["peak_allocated_bytes"].max()) if rows["status"].eq("ok").any() else float(limit or 1)
    edge = (limit if limit is not None and limit < 4 * top else top * 1.1) / size
    crosses: dict[int, list[str]] = {}
    ends: list[tuple[str, str, float, float]] = []
    for label, line in rows.groupby("label", sort=False):
        good, experiment = line[line["status"] == "ok"], line["experiment"].iloc[0]
        style = line_style(line)
        xs = [float(value) for value in good["batch_size"]]
        ys = [float(value) / size for value in good["peak_allocated_bytes"]]
        axes.plot(xs, ys, **style)
        lost = [b for b in line[line["status"] == "oom"]["batch_size"] if not xs or b > max(xs)]
        if lost:
            crosses.setdefault(min(lost), []).append(style["color"])
            axes.plot([*xs[-1:], min(lost)], [*ys[-1:], edge], **{**style, "linestyle": ":", "marker": ""})
        if xs:
            ends.append((str(label), experiment, xs[-1], ys[-1]))
    mark_crosses(axes, crosses, edge)
    if crosses:
        axes.axhline(edge, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        says = f"limit {format_bytes(limit)}" if limit is not None and edge == limit / size else "did not fit"
        where = {"xycoords": ("axes fraction", "data"), "color": MUTED, "fontsize": 10.5}
        note(axes, f"{says}; ×: out of memory", (0, edge), (4, 5), **where)
    batch_axis(axes, rows)
    axes.set_ylim(0, max(edge if crosses else 0, axes.dataLim.y1) * 1.12)
    axes.set_ylabel(unit)
    right_labels(axes, ends)
    return figure


@_styled
def throughput(rows: pd.DataFrame, batch_size: int) -> Figure:
    """Draw examples per second of every method at a batch size, with the slowest and the fastest step."""
    cells = cells_at(rows, batch_size)
    figure, axes = panel(f"Throughput, batch {batch_size}", 80 + 29 * len(cells))
    for place, cell in enumerate(cells.to_dict("records")):
        rate = cell["throughput_examples_per_s"]
        if cell["status"] != "ok" or pd.isna(rate):
            end_label(axes, place, 0, STATUS_TEXT.get(cell["status"], "no timing pass"))
            continue
        hatch = "////" if cell["source"] == "predicted" else None
        color = method_color(cell["experiment"])
        axes.barh(place, rate, height=0.6, color=color, hatch=hatch, edgecolor=SURFACE, linewidth=0.6)
        end = rate
        if not pd.isna(cell["step_time_max_s"]):
            slow, fast = batch_size / cell["step_time_max_s"], batch_size / cell["step_time_min_s"]
            axes.plot([slow, fast], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
            for x in (slow, fast):
                axes.plot([x, x], [place - 0.14, place + 0.14], color=INK, linewidth=1.4)
            end = max(rate, fast)
        end_label(axes, place, end, f"{rate:.3g}")
    method_axis(axes, cells)
    axes.set_xlim(0, 1.2 * (axes.dataLim.x1 if cells["status"].eq("ok").any() else 1))
    axes.set_xlabel("examples/s (whisker: slowest to fastest step)")
    return figure


@_styled
def pareto(rows: pd.DataFrame) -> Figure:
    """Draw time per example against peak memory, every batch size, with the front of private methods."""
    good = rows[(rows["status"] == "ok") & rows["step_time_s"].notna()]
    size, unit = size_unit(good["peak_allocated_bytes"])
    figure, axes = panel("Time against memory", 290)
    each = good["step_time_s"] / good["batch_size"]
    scale, time_unit = duration_unit(max([*each, 0.0]))
    points = good.assign(x=good["peak_allocated_bytes"].astype("float64") / size, y=each / scale)
    front = pareto_front(measured_if_any(points))
    axes.step(front["x"], front["y"], where="post", color=MUTED, linewidth=5, alpha=0.3, zorder=1)
    ends: list[tuple[str, str, float, float]] = []
    for label, line in points.groupby("label", sort=False):
        axes.plot(line["x"], line["y"], **{**line_style(line), "linewidth": 1.3})
        last = line.iloc[-1]
        ends.append((str(label), last["experiment"], last["x"], last["y"]))
    for cell in front.to_dict("records"):
        style = {"ha": "center", "va": "top", "fontsize": 10, "color": MUTED}
        note(axes, f"b{cell['batch_size']}", (cell["x"], cell["y"]), (0, -7), **style)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.08 * max([*points["y"], 1e-9]))
    axes.set_xlabel(f"peak memory ({unit})")
    axes.set_ylabel(f"time per example ({time_unit})")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    right_labels(axes, ends)
    return figure


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """Return the private rows that no other private row beats in both ``x`` and ``y``, by ``x``."""
    private = points[[is_private(name) for name in points["experiment"]]].sort_values(["x", "y"])
    best = private["y"].cummin().shift(fill_value=float("inf"))
    return private[private["y"] < best]


@_styled
def phase_timeline(record: Record, limit_bytes: int | None = None) -> Figure:
    """Draw allocated memory through one steady step with its phases.

    Args:
        record: A record with a timeline.
        limit_bytes: Top of the axis, so that several methods share it; default: this record's own peak.
    """
    timeline = record.timeline
    assert timeline is not None, "only records with a timeline are drawn"
    size, unit = size_unit([limit_bytes or max(timeline.allocated_bytes)])
    scale, time_unit = duration_unit(timeline.time_s[-1])
    mark = " (predicted)" if record.source == "predicted" else ""
    batch = record.config_resolved.get("batch_size")
    figure, axes = panel(f"{record.experiment}{mark}, batch {batch}", 215)
    times, sizes = thin(
        [value / scale for value in timeline.time_s], [value / size for value in timeline.allocated_bytes]
    )
    top = 1.45 * (limit_bytes or max(timeline.allocated_bytes)) / size
    color = method_color(record.experiment)
    axes.fill_between(times, sizes, color=color, alpha=0.22, linewidth=0)
    if mark:
        axes.fill_between(times, sizes, facecolor="none", edgecolor=color, linewidth=0, hatch="///")
    axes.plot(times, sizes, color=color, linewidth=1.7, linestyle="--" if mark else "-")
    best = max(range(len(sizes)), key=sizes.__getitem__)
    axes.plot(times[best], sizes[best], marker="o", color=color, markeredgecolor=SURFACE, markersize=6.5)
    side = "left" if times[best] < 0.55 * times[-1] else "right"
    offset = (7 if side == "left" else -7, 4)
    text = format_bytes(max(timeline.allocated_bytes))
    note(axes, text, (times[best], sizes[best]), offset, ha=side, fontweight="bold")
    axes.set_xlim(0, times[-1])
    axes.set_ylim(0, top)
    starts = [value / scale for value in timeline.phase_start_s]
    draw_bands(axes, timeline.phase_names, starts, times[-1])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(f"time within the step ({time_unit})")
    axes.set_ylabel(unit)
    return figure
