"""Write a folder of records as a report: one page, Markdown, figures and a table."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.report.frames import groups, load_frame, summarise
from memory_test.report.html import html_report
from memory_test.report.markdown import markdown_report
from memory_test.report.palette import to_png, to_svg
from memory_test.report.plates import Plate, plates


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """What `write_report` wrote.

    Attributes:
        html: The page, complete in one file.
        markdown: The same tables as Markdown.
        csv: One row per method and batch size.
        figures: SVG and PNG of every figure.
    """

    html: Path
    markdown: Path
    csv: Path
    figures: tuple[Path, ...]


def write_report(folder: Path, output_dir: Path, only: Collection[Path] | None = None) -> ReportPaths:
    """Read the records below a folder and write a report.

    Args:
        folder: Records of one machine.
        output_dir: Where to write; created if its parent exists. Older files of the same names are replaced.
        only: These files of the folder, if not all.

    Returns:
        The paths written.

    Raises:
        UsageError: No or unreadable records, records that may not be put together, or nowhere to write.
    """
    frame = load_frame(folder, only)
    pictures = output_folder(output_dir)
    drawn: dict[str, list[tuple[Plate, str]]] = {}
    written: list[Path] = []
    for group in groups(frame):
        drawn[group.slug] = []
        for plate in plates(group):
            paths = write_figure(plate.figure, pictures / plate.name, plate.title, describe(plate, frame))
            drawn[group.slug].append((plate, paths[0].read_text(encoding="utf-8")))
            written += paths
    report = ReportPaths(
        html=output_dir / "report.html",
        markdown=output_dir / "report.md",
        csv=output_dir / "summary.csv",
        figures=tuple(written),
    )
    store.write_text(report.csv, summary_csv(frame))
    store.write_text(report.markdown, markdown_report(frame))
    store.write_text(report.html, html_report(frame, drawn))
    return report


def summary_csv(frame: pd.DataFrame) -> str:
    """Return one line per method, source and batch size; sizes in bytes, times in seconds."""
    rows = summarise(frame).drop(columns=["record", "numbers", "label"])
    rows = rows.rename(columns={"path": "first_record"})
    text: str = rows.to_csv(index=False, lineterminator="\n", float_format="%.9g")
    return text


def describe(plate: Plate, frame: pd.DataFrame) -> str:
    """Return a figure's caption with the records it came from, for its metadata."""
    paths = [str(frame["path"].iloc[number - 1]) for number in plate.numbers]
    return f"{plate.caption} Records: {', '.join(paths)}"


def write_figure(figure: Figure, path: Path, title: str, text: str) -> list[Path]:
    """Write a figure as SVG and PNG.

    Args:
        figure: The figure.
        path: Where, without suffix.
        title: Stored in its metadata.
        text: Stored there too: how to read it and the records it came from.

    Returns:
        The two files, the SVG first.
    """
    vector, pixels = path.with_name(f"{path.name}.svg"), path.with_name(f"{path.name}.png")
    store.write_text(vector, to_svg(figure, title, text))
    _write_bytes(pixels, to_png(figure, title, text))
    return [vector, pixels]


def output_folder(output_dir: Path) -> Path:
    """Create the output folder and its folder of figures, and return the latter."""
    if not output_dir.parent.is_dir():
        raise UsageError.for_value(
            "output_dir", str(output_dir), "a folder in an existing folder", f"mkdir -p {output_dir.parent}"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError.for_value("output_dir", str(output_dir), "a folder", "this is a file")
    pictures = output_dir / "figures"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError.for_value(
            "output_dir", str(output_dir), "a writable folder", error.strerror or "not writable"
        ) from error
    return pictures


def _write_bytes(path: Path, data: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"output: cannot write {path}: {error.strerror}; nothing was overwritten") from error
