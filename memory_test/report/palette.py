"""How figures look: colours, sizes, and their way into SVG and PNG.

Neutral colours are stand-ins: in a dark page `DARK_RULES` restyles every element that carries one, so that
the same SVG reads on both backgrounds, inlined or alone; a viewer without media queries shows the light one.
"""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from dit_dp.clipping.registry import METHODS
from memory_test.core.schema import BREAKDOWN

WIDTH = 400.0
"""Width of a figure in points; a phone shows about 360 pixels of it, so text stays legible."""

INK, MUTED, GRID, BAND, SURFACE = "#1f2329", "#5b6571", "#d9dee4", "#f1f3f6", "#fffffe"
DARK = {INK: "#e8ebef", MUTED: "#a3adb8", GRID: "#363d46", BAND: "#20252c", SURFACE: "#14171b"}

_METHOD_COLORS = {
    "vanilla": "#7d8692",
    "auto": "#2f72d6",
    "bookkeeping": "#4aa8d8",
    "flash_clip_bk": "#3d8f9e",
    "ghost_fsdp_bk": "#1d5c86",
    "ghost": "#7a68cf",
    "flash_clip": "#a48fdc",
    "lean": "#7d9a2c",
    "per_layer": "#a5713a",
    "microbatch": "#c94a67",
    "opacus": "#d55e00",
    "opacus-functorch": "#e0a019",
    "opacus-ew": "#bb5fae",
    "opacus-ghost": "#159a78",
}
PART_COLORS = ("#2f72d6", "#1d8a77", "#e0a019", "#7a68cf", "#c94a67", "#7d9a2c")
"""Of a model's parts, in the order in which they are stacked; what belongs to none is grey."""

_MORE_COLORS = ("#8c5a9e", "#5c7f4a", "#b5835a", "#4f6d8f")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "h", "<", ">", "*", "d", "8")

CATEGORY_COLORS = dict(
    zip(
        BREAKDOWN,
        (
            "#2f66ad",
            "#6497d4",
            "#a6c6ec",
            "#1d8a77",
            "#d55e00",
            "#f0a63a",
            "#e6cf57",
            "#b98fc9",
            "#8a939e",
            "#c3c9d0",
        ),
        strict=True,
    )
)
"""Blues are what any training keeps, green what the batch costs, orange to yellow what privacy adds."""

CATEGORY_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "saved_activations": "saved activations",
    "per_example_gradients": "per-example gradients",
    "kept_for_clipping": "kept for clipping",
    "noise": "noise",
    "input": "input",
    "other": "temporaries, other",
    "unattributed": "unattributed",
}

RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 11,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.pad": 5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "hatch.linewidth": 1.1,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "memory-test",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
"""Settings under which figures are made and saved; never left in force."""


def _dark_rules() -> str:
    rules = []
    for light, dark in DARK.items():
        rules += [f'[style*="{part}: {light}"]{{{part}:{dark}!important}}' for part in ("fill", "stroke")]
    return "".join(rules)


DARK_RULES = _dark_rules()
"""CSS that turns a figure's neutral colours over, to go into a dark media query."""

FONT_RULES = 'svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif!important}'


def method_color(experiment: str) -> str:
    """Return the colour of a method, the same in every figure and report."""
    if experiment in _METHOD_COLORS:
        return _METHOD_COLORS[experiment]
    return _MORE_COLORS[_place(experiment) % len(_MORE_COLORS)]


def method_marker(experiment: str) -> str:
    """Return the marker of a method: colour is never the only difference."""
    known = list(_METHOD_COLORS)
    if experiment in known:
        return _MARKERS[known.index(experiment) % len(_MARKERS)]
    return _MARKERS[(len(known) + _place(experiment)) % len(_MARKERS)]


def _place(experiment: str) -> int:
    """Return a stable number for a method without a colour of its own."""
    later = [name for name in METHODS if name not in _METHOD_COLORS]
    return later.index(experiment) if experiment in later else sum(experiment.encode())


def to_svg(figure: Figure, title: str, description: str) -> str:
    """Return a figure as a standalone SVG document: transparent, text as text, dark where the page is.

    Args:
        figure: The figure.
        title: Stored in its metadata.
        description: Stored in its metadata: how to read it and the records it came from.
    """
    handle = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Title": title, "Description": description}
    with mpl.rc_context(RC):
        figure.savefig(handle, format="svg", transparent=True, metadata=metadata)
    rules = f"{FONT_RULES}@media (prefers-color-scheme: dark){{{DARK_RULES}}}"
    return handle.getvalue().replace("</style>", f"{rules}</style>", 1)


def to_png(figure: Figure, title: str, description: str) -> bytes:
    """Return a figure as an opaque white PNG; arguments as for `to_svg`."""
    handle = io.BytesIO()
    metadata = {"Software": None, "Title": title, "Description": description}
    with mpl.rc_context(RC):
        figure.savefig(handle, format="png", dpi=200, facecolor="white", metadata=metadata)
    return handle.getvalue()


def inline_svg(svg: str, prefix: str) -> str:
    """Return the part of an SVG document that goes into a page: no header, own ids, scaled to its column.

    Args:
        svg: What `to_svg` returned.
        prefix: Put before every id, so that figures on one page do not share any.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"\s*<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', body, count=1)
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    return re.sub(r">\s+<", "><", body).strip()
