import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.report.report import write_report
from tests.factories import environment, grid, record, write_folder

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every element is closed, and collects ids and tags."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    predicted = [record("ghost", b, source="predicted") for b in (1, 8)]
    return write_report(write_folder(folder / "records", grid() + predicted), folder / "out")


def test_everything_is_written(report):
    for path in (report.html, report.markdown, report.csv, *report.figures):
        assert path.stat().st_size > 0
    assert {path.suffix for path in report.figures} == {".svg", ".png"}
    assert not [path for path in report.html.parent.rglob("*.tmp")]


def test_the_page_is_well_formed_and_self_contained(report):
    text = report.html.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "a"}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_page_says_what_matters(report):
    text = report.html.read_text(encoding="utf-8")
    assert "Ghost clipping takes 1.07× the memory and 1.62× the time of ordinary training" in text
    assert "Some rows are predicted, not measured." in text
    assert "no result within 3600 s" in text
    assert "NVIDIA H100 80GB HBM3" in text
    assert "ghost-b4.json" in text
    for rule in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert rule in text


def test_failed_cells_are_never_marked_best(report):
    text = report.html.read_text(encoding="utf-8")
    assert 'class="best">—' not in text
    assert 'class="best">' in text


def test_figures_name_their_records(report):
    peak = next(path for path in report.figures if path.name.endswith("peak-b8.svg"))
    assert "ghost-b8.json" in peak.read_text(encoding="utf-8")


def test_what_users_wrote_is_escaped(tmp_path):
    evil = "<script>alert('1')</script> & $x$"
    bad = record("ghost", status="error", env=environment(device_name=evil))
    bad = replace(bad, failure=replace(bad.failure, message=evil, stderr_tail=evil), experiment=evil)
    good = record("vanilla", env=environment(device_name=evil))
    odd = replace(record("opacus", env=environment(device_name=evil)), experiment="a<b>$c$")
    folder = tmp_path / "records"
    write_folder(folder, [good, odd])
    store.save(bad, folder / "bad.json")
    paths = write_report(folder, tmp_path / "out")
    for path in (paths.html, paths.markdown):
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text
        assert "<b>" not in text
        assert "&lt;script&gt;" in text


def test_no_vanilla_is_said(tmp_path):
    paths = write_report(write_folder(tmp_path / "records", [record("ghost")]), tmp_path / "out")
    for path in (paths.html, paths.markdown):
        assert "no ratio is given" in path.read_text(encoding="utf-8")


def test_a_folder_of_failures_still_makes_a_report(tmp_path):
    records = [record("ghost", status="oom"), record("vanilla", status="crashed")]
    paths = write_report(write_folder(tmp_path / "records", records), tmp_path / "out")
    assert paths.figures == ()
    assert "No cell finished" in paths.html.read_text(encoding="utf-8")


def test_bad_output_folders_are_refused(tmp_path):
    folder = write_folder(tmp_path / "records", [record("ghost")])
    with pytest.raises(UsageError, match=r"output_dir: .*mkdir -p"):
        write_report(folder, tmp_path / "missing" / "out")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="this is a file"):
        write_report(folder, tmp_path / "file")


def test_the_report_needs_no_torch():
    heavy = "{'torch', 'matplotlib.pyplot'}"
    code = f"import sys, memory_test.report.report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
