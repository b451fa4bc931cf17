"""The Markdown report of a synthetic sweep, compared text by text; `--refresh-golden` rewrites it."""

from pathlib import Path

import pytest
from factories import grid, record, write_folder

from memory_test.report.frames import load_frame
from memory_test.report.markdown import markdown_report, terminal_table

FOLDER = Path(__file__).parent


def compare(text: str, name: str, refresh: bool) -> None:
    path = FOLDER / name
    if refresh:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.fixture
def frame(tmp_path):
    predicted = [record(method, 8, source="predicted", scale=0.97) for method in ("vanilla", "ghost")]
    return load_frame(write_folder(tmp_path, [*grid(), *predicted, record("ghost", 8, dtype="bf16")]))


def test_markdown_report(frame, request):
    compare(markdown_report(frame), "report.md", request.config.getoption("--refresh-golden"))


def test_terminal_table(frame, request):
    compare(terminal_table(frame), "terminal_table.txt", request.config.getoption("--refresh-golden"))


def test_the_order_of_files_does_not_matter(tmp_path):
    first = load_frame(write_folder(tmp_path / "a", grid()))
    second = load_frame(write_folder(tmp_path / "b", reversed(grid())))
    assert markdown_report(first) == markdown_report(second)
