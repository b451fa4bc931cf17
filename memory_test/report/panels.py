"""Axes, labels and marks that figures share."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dit_dp.clipping.registry import METHODS
from memory_test.core.units import GIB, KIB, MIB, format_bytes
from memory_test.report.palette import BAND, GRID, INK, MUTED, SURFACE, WIDTH, method_color, method_marker

STATUS_TEXT = {"oom": "out of memory", "timeout": "timed out", "error": "failed", "crashed": "crashed"}
"""Statuses for people."""

TIGHT: dict[str, Any] = {"columnspacing": 1.1, "handletextpad": 0.5, "labelspacing": 0.35, "borderpad": 0.1}


def panel(title: str, height: float) -> tuple[Figure, Axes]:
    """Return a titled figure of the standard width with one pair of axes; height in points."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.get_layout_engine().set(w_pad=2 / 72, h_pad=4 / 72)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, x=0.005, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure, figure.subplots()


def cells_at(rows: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Return the rows of one batch size."""
    return rows[rows["batch_size"] == batch_size].reset_index(drop=True)


def size_unit(values: Iterable[Any]) -> tuple[int, str]:
    """Return the unit that suits the largest of some byte counts."""
    largest = max((float(value) for value in values if not pd.isna(value)), default=0.0)
    return next(((size, name) for size, name in ((GIB, "GiB"), (MIB, "MiB")) if largest >= size), (KIB, "KiB"))


def duration_unit(longest: float) -> tuple[float, str]:
    """Return the unit that suits a duration in seconds."""
    return (1.0, "s") if longest >= 1 else (1e-3, "ms")


def is_private(experiment: str) -> bool:
    """Return whether a method clips; an unknown one counts as private."""
    return METHODS[experiment].private if experiment in METHODS else True


def peak_text(cell: Mapping[Hashable, Any]) -> str:
    """Return a bar's label: its peak and its ratio to vanilla, or why there is none."""
    if cell["status"] != "ok":
        return STATUS_TEXT[cell["status"]]
    plain = pd.isna(cell["memory_ratio"]) or cell["experiment"] == "vanilla"
    ratio = "" if plain else f"\u00a0\u00a0{cell['memory_ratio']:.2f}×"
    return format_bytes(int(cell["peak_allocated_bytes"])) + ratio


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write text beside a point, `offset` in points."""
    axes.annotate(text, at, offset, textcoords="offset points", annotation_clip=False, **style)


def end_label(axes: Axes, place: float, end: float, text: str, size: float = 11) -> None:
    """Write a label behind a bar's end."""
    note(axes, text, (end, place), (5, 0), va="center_baseline", fontsize=size, color=INK if end else MUTED)


def method_axis(axes: Axes, cells: pd.DataFrame) -> None:
    """Name the methods down the left side."""
    names = [str(label).replace(" (", "\n(") for label in cells["label"]]
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def line_style(line: pd.DataFrame) -> dict[str, Any]:
    """Return a method's line: its colour and marker, dashed and hollow if predicted."""
    experiment, predicted = line["experiment"].iloc[0], line["source"].iloc[0] == "predicted"
    color = method_color(experiment)
    return {
        "color": color,
        "marker": method_marker(experiment),
        "markersize": 6,
        "markerfacecolor": SURFACE if predicted else color,
        "markeredgecolor": color if predicted else SURFACE,
        "linestyle": "--" if predicted else "-",
        "linewidth": 2.4 if experiment == "ghost" else 1.7,
    }


def batch_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Show the batch sizes met, evenly spaced by doublings."""
    sizes = sorted({int(value) for value in rows["batch_size"]})
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("batch size")
    axes.grid(visible=False, axis="x")


def mark_crosses(axes: Axes, crosses: Mapping[int, Sequence[str]], edge: float) -> None:
    """Mark where methods ran out of memory; those that did at the same batch size side by side."""
    for batch, colors in crosses.items():
        for index, color in enumerate(colors):
            shift = 8.5 * (index - (len(colors) - 1) / 2)
            style = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": 16}
            note(axes, "×", (batch, edge), (shift, 0), color=color, **style)


def memory_limit(rows: pd.DataFrame) -> int | None:
    """Return the memory the out-of-memory cells were allowed, if they say."""
    lost = [record.failure for record in rows[rows["status"] == "oom"]["record"]]
    found = [item.limit_bytes for item in lost if item is not None and item.limit_bytes is not None]
    return max(found, default=None)


def right_labels(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Name lines at the right edge, at the height of their last point, moved apart where they would touch."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda end: end[3])
    wanted = [(end[3] - low) / (high - low) for end in order]
    gap = 0.083
    for (label, experiment, x, y), place in zip(order, spread_out(wanted, gap), strict=True):
        color = method_color(experiment)
        leader = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.8,
            "alpha": 0.6,
            "shrinkA": 2,
            "shrinkB": 5,
            "relpos": (0.0, 0.5),  # from the label's left edge, or leaders cross other labels
        }
        style: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": 11}
        axes.annotate(label, (x, y), (1.03, place), arrowprops=leader, annotation_clip=False, **style)


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Return increasing positions within 0 to 1, `gap` apart where that fits, close to those wanted."""
    gap = min(gap, 1 / max(len(wanted) - 1, 1))

    def push(values: Iterable[float]) -> list[float]:
        placed: list[float] = []
        for index, want in enumerate(values):
            room = 1 - gap * (len(wanted) - 1 - index)
            placed.append(max(placed[-1] + gap if placed else 0.0, min(want, room)))
        return placed

    up = push(wanted)
    down = [1 - value for value in reversed(push(1 - value for value in reversed(wanted)))]
    return [(low + high) / 2 for low, high in zip(up, down, strict=True)]


def thin(times: Sequence[float], sizes: Sequence[float], most: int = 600) -> tuple[list[float], list[float]]:
    """Return at most about `most` of the samples of a line: the lowest and the highest of each stretch."""
    if len(times) <= most:
        return list(times), list(sizes)
    width = math.ceil(2 * len(times) / most)
    kept: set[int] = {0, len(times) - 1}
    for start in range(0, len(times), width):
        stretch = range(start, min(start + width, len(times)))
        kept |= {min(stretch, key=sizes.__getitem__), max(stretch, key=sizes.__getitem__)}
    order = sorted(kept)
    return [times[index] for index in order], [sizes[index] for index in order]


def draw_bands(axes: Axes, names: Sequence[str], starts: Sequence[float], end: float) -> None:
    """Shade every other phase and name all of them at the top, upright where the band is narrow."""
    room = 320.0
    edges = [*starts, end]
    for index, start in enumerate(starts):
        if index % 2:
            axes.axvspan(start, edges[index + 1], color=BAND, zorder=0, linewidth=0)
        if index:
            axes.axvline(start, color=GRID, linewidth=0.7, zorder=0.5)
    middles = [(edges[i] + edges[i + 1]) / 2 / end for i in range(len(names))]
    upright = [(edges[i + 1] - edges[i]) / end * room < 6.6 * len(name) for i, name in enumerate(names)]
    turned = spread_out([m for m, up in zip(middles, upright, strict=True) if up], 13 / room)
    places = iter(turned)
    for name, middle, up in zip(names, middles, upright, strict=True):
        at = next(places) if up else middle
        style: dict[str, Any] = {
            "rotation": 90 if up else 0,
            "ha": "center",
            "va": "top",
            "fontsize": 10.5,
            "color": MUTED,
        }
        axes.annotate(name, (min(at, 0.98), 0.98), xycoords="axes fraction", **style)
