"""The report as one HTML file: no script, no request, light and dark, on a phone and on paper."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from markupsafe import Markup

from memory_test.core.schema import Environment
from memory_test.core.units import format_bytes
from memory_test.report import markdown
from memory_test.report.frames import (
    BASELINE,
    Group,
    environment_of,
    failures,
    groups,
    headline_batch,
    measured_if_any,
)
from memory_test.report.palette import DARK_RULES, FONT_RULES, inline_svg, method_color
from memory_test.report.plates import PEAK_CAPTION, TIMELINE_CAPTION, Plate, ranges


def html_report(frame: pd.DataFrame, drawn: Mapping[str, list[tuple[Plate, str]]]) -> str:
    """Return the page.

    Args:
        frame: What `frames.load_frame` returned.
        drawn: By group slug: the figures and their SVG documents.

    Returns:
        A complete HTML document; everything that came from records is escaped.
    """
    templates = Templates(
        loader=PackageLoader("memory_test.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = groups(frame)
    environment = environment_of(frame)
    return templates.get_template("report.html.j2").render(
        title=_title(found, environment),
        sections=[_section(index, group, frame, drawn[group.slug]) for index, group in enumerate(found)],
        environment=_environment_facts(environment),
        environment_line=markdown.environment_line(environment),
        records=_records(frame),
        schema_version=frame["record"].iloc[0].schema_version,
        headings=markdown.HEADINGS,
        spread_note=markdown.SPREAD_NOTE,
        no_vanilla=markdown.NO_VANILLA,
        peak_caption=PEAK_CAPTION,
        timeline_caption=TIMELINE_CAPTION,
        figure_rules=Markup(FONT_RULES),
        dark_rules=Markup(DARK_RULES),
    )


def _title(found: list[Group], environment: Environment | None) -> str:
    models = list(dict.fromkeys(str(group.config.get("model")) for group in found))
    model = models[0] if len(models) == 1 else f"{len(models)} models"
    return f"What privacy costs {model}" + (f" on {environment.device_name}" if environment else "")


def _section(index: int, group: Group, frame: pd.DataFrame, drawn: list[tuple[Plate, str]]) -> dict[str, Any]:
    rows, batch = group.rows, headline_batch(group.rows)
    shelves: dict[str, list[dict[str, Any]]] = {"overview": [], "timeline": [], "batches": []}
    for place, (plate, svg) in enumerate(drawn):
        picture = Markup(inline_svg(svg, f"g{index}f{place}-"))
        shown = {
            "name": plate.name,
            "caption": plate.caption,
            "records": ranges(plate.numbers),
            "svg": picture,
        }
        shelves[plate.shelf].append(shown)
    return {
        "title": group.title,
        "finding": markdown.key_finding(rows).replace("batch ", "batch\u00a0"),
        "reach": markdown.reach(rows),
        "first_table": _table(rows if batch is None else rows[rows["batch_size"] == batch]),
        "batch": batch,
        "table": _table(rows) if batch is not None and rows["batch_size"].nunique() > 1 else [],
        "has_vanilla": bool(rows["memory_ratio"].notna().any()),
        "predicted": bool(rows["source"].eq("predicted").any()),
        "shelves": shelves,
        "failures": _failures(frame[frame["group"] == rows["group"].iloc[0]]),
        "protocol": markdown.protocol_line(group),
        "config": {name: _plain(value) for name, value in sorted(group.config.items())},
    }


def _table(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the summary's rows; the leanest and the fastest private cell of each batch size are marked."""
    made = []
    ordered = rows.sort_values("batch_size", kind="stable")
    good = measured_if_any(ordered[(ordered["status"] == "ok") & (ordered["experiment"] != BASELINE)])
    leanest = good.groupby("batch_size")["peak_allocated_bytes"].min().to_dict()
    fastest = good.groupby("batch_size")["step_time_s"].min().to_dict()
    before = None
    for cell, index, row in zip(markdown.cells(rows), ordered.index, ordered.to_dict("records"), strict=True):
        batch, usable = (
            row["batch_size"],
            index in good.index,
        )
        made.append(
            {
                "values": cell.values,
                "color": method_color(row["experiment"]),
                "status": row["status"],
                "leanest": bool(usable and row["peak_allocated_bytes"] == leanest.get(batch)),
                "fastest": bool(usable and row["step_time_s"] == fastest.get(batch)),
                "first": batch != before,
                "records": ranges(cell.numbers),
            }
        )
        before = batch
    return made


def _failures(frame: pd.DataFrame) -> list[dict[str, Any]]:
    made = []
    for row in failures(frame).to_dict("records"):
        sizes = [None if pd.isna(row[name]) else int(row[name]) for name in ("requested_bytes", "free_bytes")]
        made.append(
            {
                "experiment": row["experiment"],
                "batch_size": row["batch_size"],
                "status": row["status"],
                "phase": row["phase"] or "—",
                "reason": row["reason"],
                "requested": format_bytes(sizes[0]),
                "free": format_bytes(sizes[1]),
                "stderr_tail": row["stderr_tail"],
            }
        )
    return made


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    columns = ["path", "cell_id", "status", "source"]
    named = [{str(key): value for key, value in row.items()} for row in frame[columns].to_dict("records")]
    return [{"number": number, **row} for number, row in enumerate(named, start=1)]


def _environment_facts(environment: Environment | None) -> dict[str, str]:
    """Return the environment, one fact a name, sizes for people, without what is not there."""
    if environment is None:
        return {}
    facts: dict[str, str] = {}
    for name, value in vars(environment).items():
        if isinstance(value, Mapping):
            facts |= {f"{name}: {key}": str(item) for key, item in sorted(value.items())}
        elif value is not None:
            sized = name.endswith("_bytes")
            facts[name.removesuffix("_bytes")] = format_bytes(value) if sized else _plain(value)
    return facts


def _plain(value: object) -> str:
    words = {None: "—", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
