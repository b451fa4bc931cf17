"""The figure of a comparison: time against memory, both as multiples of the baseline's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memory_test.compare.schema import Comparison, Spread
from memory_test.report.palette import INK, MUTED, RC, SURFACE, method_color, method_marker
from memory_test.report.panels import note, panel, right_labels

CAPTION = (
    "Each point is a contender; lower left is better, the cross of lines is ordinary training. Filled: the whole step, "
    "with the quartiles of its ratios; hollow below it: the same step without its noise."
)


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A contender in the plane: multiples of the baseline's memory and time."""

    label: str
    method: str
    memory: float
    time: Spread
    without_noise: float


def time_against_memory(comparison: Comparison) -> Figure | None:
    """Draw every contender that finished; `None` if none did beside the baseline."""
    points = [point for point in _points(comparison) if point.label != comparison.baseline]
    if not points:
        return None
    with mpl.rc_context(RC):
        figure, axes = panel(f"Time against memory, {comparison.name}", 330)
        axes.axvline(1, color=MUTED, linewidth=1.2, zorder=1)
        axes.axhline(1, color=MUTED, linewidth=1.2, zorder=1)
        for point in points:
            _draw(axes, point)
        _frame(axes, points)
        right_labels(axes, [(point.label, point.method, point.memory, point.time.median) for point in points])
        end = {"ha": "right", "va": "top", "fontsize": 10.5, "color": MUTED}
        note(axes, comparison.baseline, (axes.get_xlim()[1], 1), (-3, -4), **end)
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
        return figure


def _points(comparison: Comparison) -> Iterator[_Point]:
    for contender in comparison.contenders:
        memory, time, without = contender.memory_ratio, contender.time_ratio, contender.time_ratio_without_noise
        if memory is not None and time is not None and without is not None:
            names = {"label": contender.label, "method": contender.method}
            yield _Point(**names, memory=memory, time=time, without_noise=without.median)


def _draw(axes: Axes, point: _Point) -> None:
    x, time, without = point.memory, point.time, point.without_noise
    color, marker = method_color(point.method), method_marker(point.method)
    axes.plot([x, x], [without, time.median], color=color, linewidth=1.2, alpha=0.6, zorder=2)
    axes.plot([x, x], [time.q1, time.q3], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=3)
    style: dict[str, Any] = {"marker": marker, "linestyle": "", "color": color}
    axes.plot(x, without, **style, markersize=5, markerfacecolor=SURFACE, markeredgecolor=color, zorder=4)
    axes.plot(x, time.median, **style, markersize=8, markeredgecolor=SURFACE, zorder=5)


def _frame(axes: Axes, points: list[_Point]) -> None:
    """Set limits that show the baseline and every whisker, and name the axes."""
    xs = [1.0, *(point.memory for point in points)]
    ys = [1.0, *(y for point in points for y in (point.time.q1, point.time.q3, point.without_noise))]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    axes.set_xlim(min(xs) - 0.08 * width - 0.02, max(xs) + 0.15 * width + 0.02)
    axes.set_ylim(min(ys) - 0.1 * height - 0.02, max(ys) + 0.08 * height + 0.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("peak memory, multiple of ordinary training")
    axes.set_ylabel("time of a step, multiple")
