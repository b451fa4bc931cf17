"""Write what a comparison found: one Markdown page and a figure a configuration."""

from pathlib import Path

from memory_test.compare.figure import CAPTION, time_against_memory
from memory_test.compare.schema import Comparison
from memory_test.compare.table import markdown_page
from memory_test.core import store
from memory_test.report.report import output_folder, write_figure


def write_report(name: str, comparisons: list[Comparison], folder: Path) -> Path:
    """Write ``report.md`` and ``figures/`` into a folder of results; return the page.

    Args:
        name: What the comparison file calls itself.
        comparisons: At least one, all of one environment.
        folder: Where the results are.
    """
    pictures = output_folder(folder)
    figures = {}
    for comparison in comparisons:
        figure = time_against_memory(comparison)
        if figure is not None:
            text = f"{CAPTION} Result: {comparison.name}.json"
            written = write_figure(figure, pictures / comparison.name, f"Time against memory, {comparison.name}", text)
            figures[comparison.name] = written[1].relative_to(folder).as_posix()
    page = folder / "report.md"
    store.write_text(page, markdown_page(name, comparisons, figures))
    return page
