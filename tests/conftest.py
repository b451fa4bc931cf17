"""Options of the test run. One thread: the models are tiny, and two threads on a busy machine wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh-golden", action="store_true", help="write the golden files instead of comparing with them"
    )
    parser.addoption(
        "--sensitivity-record", type=Path, default=None, help="file for the record of the random cases (marker full)"
    )


@pytest.fixture
def refresh_golden(request: pytest.FixtureRequest) -> bool:
    """Return whether golden files are to be written."""
    return bool(request.config.getoption("--refresh-golden"))


@pytest.fixture
def sensitivity_record(request: pytest.FixtureRequest) -> Path | None:
    """Return where the record of the random cases is to be written, if anywhere."""
    path: Path | None = request.config.getoption("--sensitivity-record")
    return path
