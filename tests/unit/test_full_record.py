"""The record of a full run: what is added up, and that the committed one has every stated count."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from tests.full_record import COUNTS, SCHEMA_VERSION, FullRecord
from tests.sensitivity.record import Tally

COMMITTED = {
    "points of the accountants' grid": 200,
    "bad inputs of an accountant, each refused within a second": 30,
    "seeds of runs with empty batches": 200,
    "SIGKILLs of a run that then went on": 50,
    "damaged or forged checkpoints": 100,
    "sets of 1e6 noise draws": 18,
    "audited runs, each whole and broken in three ways": 120,
}
"""The least of each; random models have a record of their own."""


def report(
    test: str, outcome: Literal["passed", "failed", "skipped"], when: Literal["setup", "call"] = "call", **said: Any
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=test,
        location=(test, 0, test),
        keywords={},
        outcome=outcome,
        longrepr=None,
        when=when,
        duration=1.5,
        user_properties=list(said.items()),
    )


def ended(folder: Path, *reports: pytest.TestReport) -> FullRecord:
    """Return the record of a run that goes on with what is in the folder."""
    record = FullRecord(folder, folder / "lines" / "commit.jsonl")
    for one in reports:
        record.pytest_runtest_logreport(one)
    record.write()
    return record


def test_counts_of_workers_are_added_up(tmp_path: Path) -> None:
    ended(
        tmp_path,
        report("a.py::one[0]", "passed", "setup"),
        report("a.py::one[0]", "passed", stated=["kills", 5]),
        report("a.py::one[1]", "passed", stated=["kills", 5], off=["a peak", 0.25]),
        report("a.py::two", "failed", stated=["kills", 7], off=["a peak", 0.75]),
        report("a.py::three", "failed", "setup"),
    )
    written = json.loads((tmp_path / "tests" / "record.json").read_text())
    assert written["tests"] == {"failed": 2, "passed": 2}
    assert written["counts"] == {
        "kills": {"tests": ["a.py::one", "a.py::two"], "passed": 10, "failed": 7, "seconds": 4.5}
    }
    assert written["off"] == {"a peak": {"cases": 2, "median": 0.5, "worst": 0.75}}
    assert not (tmp_path / "sensitivity").exists()


class Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


class Config:
    class hook:
        left_out: ClassVar[list[str]] = []

        @classmethod
        def pytest_deselected(cls, items: list[Item]) -> None:
            cls.left_out += [item.nodeid for item in items]


def test_a_run_goes_on_with_what_did_not_pass(tmp_path: Path) -> None:
    ended(
        tmp_path, report("a.py::one", "passed", stated=["kills", 5]), report("a.py::two", "failed", stated=["kills", 7])
    )
    again, items = ended(tmp_path), [Item("a.py::one"), Item("a.py::two"), Item("a.py::three")]
    again.pytest_collection_modifyitems(Config(), items)  # type: ignore[arg-type]
    assert [item.nodeid for item in items] == ["a.py::two", "a.py::three"]
    assert Config.hook.left_out == ["a.py::one"]
    ended(tmp_path, report("a.py::two", "passed", stated=["kills", 7]))
    written = json.loads((tmp_path / "tests" / "record.json").read_text())
    assert written["tests"] == {"passed": 2}
    assert (written["counts"]["kills"]["passed"], written["counts"]["kills"]["failed"]) == (12, 0)


def test_a_tally_is_what_a_worker_can_hand_on() -> None:
    found = Tally({"ghost": {"noise": 0.25}}, ["seed 3"], Counter({"attention": 2}))
    said = found.plain()
    assert type(said["kinds"]) is dict
    other = Tally()
    other.merge(json.loads(json.dumps(said)))
    assert other == found


def test_random_cases_of_workers_are_put_together(tmp_path: Path) -> None:
    said = []
    for margin, failures in ((0.25, []), (0.5, ["seed 3"])):
        found = {"margins": {"ghost": {"noise": margin}}, "failures": failures, "kinds": {"attention": 2}}
        said.append({"num_cases": 20, "methods": ["ghost"], "found": found})
    ended(tmp_path, *(report(f"a.py::one[{n}]", "passed", tally=value) for n, value in enumerate(said)))
    written = json.loads((tmp_path / "sensitivity" / "record.json").read_text())
    assert (written["num_cases"], written["methods"], written["failures"]) == (40, ["ghost"], ["seed 3"])
    assert written["worst_margins"] == {"ghost": {"noise": 0.5}}
    assert written["layer_kinds"] == {"attention": 4}


@pytest.mark.skipif(not COUNTS.exists(), reason="no record committed yet; `make test-full` writes it")
def test_the_committed_record_has_every_stated_count() -> None:
    committed = json.loads(COUNTS.read_text(encoding="utf-8"))
    assert committed["schema_version"] == SCHEMA_VERSION
    assert set(committed["tests"]) <= {"passed", "skipped"}
    assert not committed["environment"]["dirty"]
    for what, least in COMMITTED.items():
        assert committed["counts"][what]["passed"] >= least, what
        assert committed["counts"][what]["failed"] == 0, what
