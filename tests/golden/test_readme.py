"""The README's tables are what the committed records say; `--refresh-golden` writes them."""

import re
from pathlib import Path

import pytest

from memory_test.compare.schema import load
from memory_test.compare.table import summary
from memory_test.report.frames import load_frame
from memory_test.report.markdown import excerpt

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
MARKED = re.compile(r"<!-- (table|comparison): (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def generated(kind: str, folder: Path) -> str:
    """Return what stands between the marks."""
    if kind == "table":
        return excerpt(load_frame(folder))
    comparisons = [load(path) for path in folder.glob("*.json")]
    return summary(sorted(comparisons, key=lambda comparison: comparison.created_at))


def test_tables_come_from_the_committed_records(refresh_golden: bool) -> None:
    text = README.read_text(encoding="utf-8")

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: {match[2]} -->\n{generated(match[1], ROOT / match[2])}<!-- end -->"

    wanted, count = MARKED.subn(replaced, text)
    assert count == 1
    if refresh_golden:
        README.write_text(wanted, encoding="utf-8")
    assert text == wanted or refresh_golden


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
