"""The Markdown report of a synthetic sweep, compared text by text; `--refresh-golden` rewrites it."""

from pathlib import Path

import pytest

from memory_test.report.frames import load_frame, summarise
from memory_test.report.markdown import key_finding, markdown_report, terminal_table
from tests.factories import grid, record, write_folder

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


@pytest.mark.parametrize(
    ("records", "finding"),
    [
        ([record("vanilla")], "Ordinary training takes 18.47 GiB at batch 4."),
        ([record("ghost")], "Ghost clipping takes 19.41 GiB at batch 4; no ratio without vanilla."),
        (
            [record("vanilla"), record("opacus", status="oom"), record("ghost")],
            "Ghost clipping takes 1.05× the memory and 1.62× the time of ordinary training at batch 4; "
            "Opacus hooks did not fit.",
        ),
        (
            [record("ghost", status="timeout"), record("ghost", source="predicted")],
            "Ghost clipping is predicted to take 19.41 GiB at batch 4; no ratio without vanilla.",
        ),
        (
            [record(method, source="predicted") for method in ("vanilla", "ghost")],
            "Ghost clipping is predicted to take 1.05× the memory and 1.62× the time of ordinary training at batch 4.",
        ),
        ([record("ghost", status="oom")], "No cell finished (1 × oom), so there is nothing to compare."),
    ],
)
def test_key_finding(tmp_path, records, finding):
    rows = summarise(load_frame(write_folder(tmp_path, records)))
    assert key_finding(rows) == finding


def test_the_order_of_files_does_not_matter(tmp_path):
    first = load_frame(write_folder(tmp_path / "a", grid()))
    second = load_frame(write_folder(tmp_path / "b", reversed(grid())))
    assert markdown_report(first) == markdown_report(second)
