"""What `make test-full` leaves: the counts that were stated and run, errors found, and what the random cases showed.

A test says with the fixture `stated` what it checks and how often, with `found_off` how far off it found something.
The process that leads the run keeps a line for every test that ends, however many workers there are; what passed with
these sources is not run again, so that a long run can be stopped and go on. When all that was asked for has passed, the
lines are added up.
"""

import dataclasses
import datetime
import hashlib
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memory_test.core import environment, store
from tests.sensitivity.record import Tally, save

SCHEMA_VERSION = 1
STATED = "stated"
OFF = "off"
TALLY = "tally"
ROOT = Path(__file__).resolve().parents[1]
COUNTS = ROOT / "results" / "tests" / "record.json"
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
    """A pytest plugin that keeps what tests say, leaves out those that passed, and writes both records at the end.

    Args:
        folder: Of the records; made.
        lines: File of what ended so far with these sources; made.
        leads: Whether this process leads the run; workers only leave tests out.
    """

    def __init__(self, folder: Path, lines: Path, *, leads: bool = True) -> None:
        self.folder, self.lines, self.leads = folder, lines, leads
        lines.parent.mkdir(parents=True, exist_ok=True)
        self._ended = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the last line of each test."""
        if not self.lines.exists():
            return {}
        found = (json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines())
        return {line["test"]: line for line in found}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what passed; every worker sees the same, since nothing runs before all have collected."""
        passed = {test for test, line in self._ended.items() if line["outcome"] == "passed"}
        done = [item for item in items if item.nodeid in passed]
        items[:] = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a test says; a failed fixture is a failed test."""
        if not self.leads or (report.when != "call" and report.passed):
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
            "said": [[name, value] for name, value in report.user_properties if name in (STATED, OFF, TALLY)],
        }
        self._ended[report.nodeid] = line
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the records; of the random cases only where there were any."""
        if not self.leads or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        if not self._ended:
            return
        self.write()
        session.exitstatus = pytest.ExitCode.OK

    def write(self) -> None:
        """Add the lines up and write the records."""
        counts: dict[str, Count] = {}
        off: dict[str, list[float]] = {}
        tally, num_cases, methods = Tally(), 0, ()
        for line in self._ended.values():
            for name, value in line["said"]:
                if name == STATED:
                    _add(counts.setdefault(value[0], Count()), line, value[1])
                elif name == OFF:
                    off.setdefault(value[0], []).append(value[1])
                else:
                    num_cases, methods = num_cases + value["num_cases"], tuple(value["methods"])
                    tally.merge(value["found"])
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": dataclasses.asdict(environment.capture("cpu")),
            "seconds": round(sum(line["seconds"] for line in self._ended.values())),
            "tests": dict(sorted(Counter(line["outcome"] for line in self._ended.values()).items())),
            "counts": {what: dataclasses.asdict(count) for what, count in sorted(counts.items())},
            "off": {
                what: {"cases": len(shares), "median": statistics.median(shares), "worst": max(shares)}
                for what, shares in sorted(off.items())
            },
        }
        path = self.folder / "tests" / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(path, json.dumps(record, indent=1) + "\n")
        if num_cases:
            save(tally.record(0, num_cases, methods), self.folder / "sensitivity" / "record.json")


def lines_of_these_sources() -> Path:
    """Return the file of what ended so far, named by a digest of packages, tests and what they install."""
    total = hashlib.sha256()
    packages = (path for name in ("dit_dp", "memory_test", "tests") for path in (ROOT / name).rglob("*"))
    for path in sorted([*packages, *(ROOT / name for name in ("pyproject.toml", "setup.cfg", "constraints.txt"))]):
        if path.is_file() and path.suffix != ".pyc":
            total.update(f"{path.relative_to(ROOT)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return ROOT / "build" / "test-full" / f"{total.hexdigest()[:16]}.jsonl"


def _add(count: Count, line: dict[str, Any], number: int) -> None:
    test = line["test"].partition("[")[0]
    count.tests = sorted({*count.tests, test})
    if line["outcome"] == "passed":
        count.passed += number
    else:
        count.failed += number
    count.seconds = round(count.seconds + line["seconds"], 1)
