"""Predicted against emulated peaks, drawn."""

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from memory_test.core.units import GIB
from memory_test.report.palette import INK, MUTED, RC, method_color, method_marker
from memory_test.report.panels import TIGHT, note, panel

TICKS = (0.5, 1, 2, 4, 8, 16, 32, 64)
"""GiB."""

QUANTITIES = {"peak_allocated_bytes": "allocated", "peak_reserved_bytes": "reserved"}

DESCRIPTION = (
    "Each point is one configuration: its peak on the emulated CUDA runtime, across, and the predicted one, up. On the "
    "line both agree. From results/prediction/emulator.json."
)


def scatter(record: dict[str, Any], side: str = "emulated") -> Figure:
    """Draw a record's configurations: filled where allocated, hollow where reserved.

    Args:
        record: With ``configurations`` and ``summary``.
        side: What predictions were compared with, as entries name it.
    """
    with mpl.rc_context(RC):
        figure, axes = panel(f"Predicted against {side} peak memory", 420)
        for method in dict.fromkeys(each["changes"]["experiment"] for each in record["configurations"]):
            _points(axes, [e for e in record["configurations"] if e["changes"]["experiment"] == method], method, side)
        _decorate(axes, record["summary"], side)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3, handlelength=0.9, **TIGHT)
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
    return figure


def _points(axes: Axes, entries: list[dict[str, Any]], method: str, side: str) -> None:
    color = method_color(method)
    for name, quantity in QUANTITIES.items():
        xs = [each[side][name] / GIB for each in entries]
        ys = [each["predicted"][name] / GIB for each in entries]
        filled = quantity == "allocated"
        axes.plot(
            xs,
            ys,
            linestyle="",
            marker=method_marker(method),
            markersize=5 if filled else 8,
            color=color,
            markerfacecolor=color if filled else "none",
            markeredgewidth=0.9,
            label=method if filled else None,
        )


def _decorate(axes: Axes, summary: dict[str, Any], side: str) -> None:
    ends = (TICKS[0] / 2, TICKS[-1] * 1.5)
    axes.plot(ends, ends, color=MUTED, linewidth=1, zorder=0)
    for axis, name in ((axes.xaxis, side), (axes.yaxis, "predicted")):
        axis.set_label_text(f"{name} (GiB)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    place = 1.0
    for name, quantity in QUANTITIES.items():
        errors = [100 * summary[name][f"{which}_relative_error"] for which in ("median", "worst")]
        mark = "filled" if quantity == "allocated" else "hollow"
        text = f"{quantity} ({mark}): median {errors[0]:.2f} %, worst {errors[1]:.2f} %"
        note(axes, text, (0, place), (6, -12), xycoords="axes fraction", color=INK, fontsize=10.5)
        place -= 0.055
