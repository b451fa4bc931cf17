"""Options of the test run. One thread: the models are tiny, and two threads on a busy machine wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.samples import SEED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh-golden", action="store_true", help="write the golden files instead of comparing with them"
    )
    parser.addoption(
        "--full-record", type=Path, default=None, help="folder for the records of what was stated and run (marker full)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let the process that leads the run keep the record, and all leave out what passed."""
    folder: Path | None = config.getoption("--full-record")
    if folder is not None:
        if config.option.keyword:
            raise pytest.UsageError(
                "--full-record: got -k; accepted: none, a record of a few tests would replace the whole"
            )
        from tests.full_record import FullRecord, lines_of_these_sources

        leads = not hasattr(config, "workerinput")
        config.pluginmanager.register(FullRecord(folder, lines_of_these_sources(), leads=leads))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was drawn where a sample of many combinations ran."""
    terminalreporter.write_line(f"samples of tests.samples: SAMPLE_SEED={SEED}")


@pytest.fixture
def refresh_golden(request: pytest.FixtureRequest) -> bool:
    """Return whether golden files are to be written."""
    return bool(request.config.getoption("--refresh-golden"))


@pytest.fixture
def stated(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Return a function that notes, for the record of a full run, what this test checks and how often."""
    return lambda what, number: record_property("stated", [what, number])


@pytest.fixture
def found_off(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Return a function that notes, for the record of a full run, by which share of the truth something is off."""
    return lambda what, share: record_property("off", [what, share])
