"""What `make test-full` leaves: the counts that were stated and run, and what the random cases showed.

A test says with the fixture `stated` what it checks and how often; the process that leads the run adds it up, however
many workers there are.
"""

import dataclasses
import datetime
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memory_test.core import environment, store
from tests.sensitivity.record import Tally, save

SCHEMA_VERSION = 1
STATED = "stated"
TALLY = "tally"
ROOT = Path(__file__).resolve().parents[1] / "results"
COUNTS = ROOT / "tests" / "record.json"
"""Where the counts are committed."""


@dataclasses.dataclass(kw_only=True)
class Count:
    """How often one thing was checked.

    Attributes:
        tests: The tests that did it, without their parameters.
        passed: Checked in tests that passed.
        failed: In tests that did not.
        seconds: That these tests took, on one core each.
    """

    tests: list[str] = dataclasses.field(default_factory=list)
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0


class FullRecord:
    """A pytest plugin that writes both records at the end of a run."""

    def __init__(self, folder: Path) -> None:
        """Write into this folder; it is made."""
        self.folder = folder
        self.counts: dict[str, Count] = {}
        self.outcomes: Counter[str] = Counter()
        self.tally, self.num_cases, self.methods = Tally(), 0, ()
        self.began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test states; a failed fixture is a failed test."""
        if report.when != "call" and report.passed:
            return
        self.outcomes[report.outcome] += 1
        for name, value in report.user_properties:
            if name == STATED:
                assert isinstance(value, list | tuple)
                self._add(report, *value)
            elif name == TALLY:
                assert isinstance(value, dict)
                self.num_cases += value["num_cases"]
                self.methods = tuple(value["methods"])
                self.tally.merge(value["found"])

    def _add(self, report: pytest.TestReport, what: str, number: int) -> None:
        count = self.counts.setdefault(what, Count())
        test = report.nodeid.partition("[")[0]
        if test not in count.tests:
            count.tests = sorted([*count.tests, test])
        if report.passed:
            count.passed += number
        else:
            count.failed += number
        count.seconds = round(count.seconds + report.duration, 1)

    def pytest_sessionfinish(self) -> None:
        """Write the records; of the random cases only where there were any."""
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": dataclasses.asdict(environment.capture("cpu")),
            "seconds": round(time.monotonic() - self.began),
            "tests": dict(sorted(self.outcomes.items())),
            "counts": {what: dataclasses.asdict(count) for what, count in sorted(self.counts.items())},
        }
        path = self.folder / COUNTS.relative_to(ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(path, json.dumps(record, indent=1) + "\n")
        if self.num_cases:
            save(self.tally.record(0, self.num_cases, self.methods), self.folder / "sensitivity" / "record.json")
