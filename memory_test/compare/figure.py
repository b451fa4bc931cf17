"""The figure of a comparison: time against memory, both as multiples of the baseline's."""

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memory_test.compare.schema import Comparison, Contender
from memory_test.report.palette import INK, MUTED, RC, SURFACE, method_color, method_marker
from memory_test.report.panels import note, panel, right_labels

CAPTION = (
    "Each point is a contender; lower left is better, the cross of lines is ordinary training. Filled: the whole step, "
    "with the quartiles of its ratios; hollow below it: the same step without its noise."
)


def time_against_memory(comparison: Comparison) -> Figure | None:
    """Draw every contender that finished; `None` if none did beside the baseline."""
    shown = [c for c in comparison.contenders if c.time_ratio and c.time_ratio_without_noise and c.memory_ratio]
    if len(shown) < 2:
        return None
    with mpl.rc_context(RC):
        figure, axes = panel(f"Time against memory, {comparison.name}", 330)
        axes.axvline(1, color=MUTED, linewidth=1.2, zorder=1)
        axes.axhline(1, color=MUTED, linewidth=1.2, zorder=1)
        others = [c for c in shown if c.label != comparison.baseline]
        for contender in others:
            _draw(axes, contender)
        _frame(axes, shown)
        right_labels(axes, [(c.label, c.method, c.memory_ratio or 0.0, _height(c)) for c in others])
        end = {"ha": "right", "va": "top", "fontsize": 10.5, "color": MUTED}
        note(axes, comparison.baseline, (axes.get_xlim()[1], 1), (-3, -4), **end)
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
        return figure


def _height(contender: Contender) -> float:
    assert contender.time_ratio is not None
    return contender.time_ratio.median


def _draw(axes: Axes, contender: Contender) -> None:
    whole, without, x = contender.time_ratio, contender.time_ratio_without_noise, contender.memory_ratio
    assert whole is not None
    assert without is not None
    assert x is not None
    color, marker = method_color(contender.method), method_marker(contender.method)
    axes.plot([x, x], [without.median, whole.median], color=color, linewidth=1.2, alpha=0.6, zorder=2)
    axes.plot([x, x], [whole.q1, whole.q3], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=4)
    style: dict[str, Any] = {"marker": marker, "linestyle": "", "color": color}
    axes.plot(x, without.median, **style, markersize=5, markerfacecolor=SURFACE, markeredgecolor=color, zorder=3)
    axes.plot(x, whole.median, **style, markersize=8, markeredgecolor=SURFACE, zorder=5)


def _frame(axes: Axes, shown: list[Contender]) -> None:
    """Set limits that show the baseline and every whisker, and name the axes."""
    xs = [c.memory_ratio or 1.0 for c in shown]
    tops = [c.time_ratio.q3 for c in shown if c.time_ratio]
    lows = [c.time_ratio_without_noise.median for c in shown if c.time_ratio_without_noise]
    width, height = max(xs) - min(xs), max(tops) - min(lows)
    axes.set_xlim(min(xs) - 0.08 * width - 0.02, max(xs) + 0.15 * width + 0.02)
    axes.set_ylim(min(lows) - 0.1 * height - 0.02, max(tops) + 0.08 * height + 0.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("peak memory, multiple of ordinary training")
    axes.set_ylabel("time of a step, multiple")
