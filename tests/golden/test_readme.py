"""The README's tables are what the committed records say; `--refresh-golden` writes them."""

import re
from pathlib import Path

import pytest

from memory_test.report.frames import load_frame
from memory_test.report.markdown import excerpt

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
MARKED = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_tables_come_from_the_committed_records(refresh_golden: bool) -> None:
    text = README.read_text(encoding="utf-8")

    def generated(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{excerpt(load_frame(ROOT / match[1]))}<!-- end -->"

    wanted, count = MARKED.subn(generated, text)
    assert count == 1
    if refresh_golden:
        README.write_text(wanted, encoding="utf-8")
    assert text == wanted or refresh_golden


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
