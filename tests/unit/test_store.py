"""Records on disk: whole or not at all, and read strictly."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.core.schema import BREAKDOWN, SCHEMA_VERSION, Record
from tests.factories import record as make_record

CONTRACT = {
    "schema_version",
    "status",
    "source",
    "experiment",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "first_step_s",
    "step_times_s",
    "throughput_examples_per_s",
    "phases",
    "breakdown_bytes",
    "config_requested",
    "config_resolved",
    "environment",
}


def test_round_trip(tmp_path: Path) -> None:
    record = make_record()
    store.save(record, tmp_path / "r.json")
    assert store.load(tmp_path / "r.json") == record


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    peak=st.integers(0, 2**45),
    times=st.lists(st.floats(1e-6, 1e4), max_size=5),
    message=st.text(max_size=20),
)
def test_round_trip_of_any_numbers(tmp_path: Path, peak: int, times: list[float], message: str) -> None:
    record = dataclasses.replace(
        make_record(),
        peak_allocated_bytes=peak,
        step_times_s=times,
        breakdown_bytes=dict.fromkeys(BREAKDOWN, peak),
        choices={"note": message},
    )
    store.save(record, tmp_path / "r.json")
    assert store.load(tmp_path / "r.json") == record


def test_keys_of_the_contract(tmp_path: Path) -> None:
    assert set(json.loads(store.dump(make_record()))) >= CONTRACT


def damaged(tmp_path: Path, change: object) -> Path:
    path = tmp_path / "r.json"
    data = json.loads(store.dump(make_record()))
    data.update(change)  # type: ignore[call-overload]
    path.write_text(json.dumps(data))
    return path


def test_half_written_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(store.dump(make_record())[:200])
    with pytest.raises(UsageError, match=r"r\.json.*complete JSON"):
        store.load(path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="newer memory-test"):
        store.load(damaged(tmp_path, {"schema_version": SCHEMA_VERSION + 1}))


@pytest.mark.parametrize("change", [{"status": "fine"}, {"peak_allocated_bytes": 1.5}, {"surprise": 1}])
def test_what_is_not_a_record_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        store.load(damaged(tmp_path, change))


def test_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    store.save(make_record(), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device; nothing was overwritten"):
        store.save(dataclasses.replace(make_record(), status="oom"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_record_that_cannot_be_written_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    with pytest.raises(UsageError, match=r"kept as .*rescued-.*r\.json"):
        store.save_measured(make_record(), tmp_path / "gone" / "r.json")
    assert store.load(next(elsewhere.glob("*/r.json"))) == make_record()


@pytest.mark.parametrize("name", ["missing/r.json", "."])
def test_unusable_output_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="output"):
        store.check_writable(tmp_path / name)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run a sweep"):
        list(store.load_folder(tmp_path))
    with pytest.raises(UsageError, match="existing folder"):
        list(store.load_folder(tmp_path / "no"))


GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_a_record_of_every_schema_is_still_read(version: int, refresh_golden: bool) -> None:
    """One file per schema version; a change of the schema needs a new version and a new file."""
    path = GOLDEN / f"record_v{version}.json"
    if refresh_golden and version == SCHEMA_VERSION:
        path.write_text(store.dump(make_record()))
    record = store.load(path)
    assert isinstance(record, Record)
    written, golden = json.loads(store.dump(record)), json.loads(path.read_text())
    assert golden["schema_version"] == version
    assert _as_far_as(golden, written) == golden
    if version == SCHEMA_VERSION:
        assert written.keys() == golden.keys()


def _as_far_as(golden: Any, written: Any) -> Any:
    """Return what was written without the keys that a later schema added."""
    if isinstance(golden, dict):
        return {name: _as_far_as(value, written[name]) for name, value in golden.items()}
    if isinstance(golden, list):
        assert len(golden) == len(written)
        return [_as_far_as(*pair) for pair in zip(golden, written, strict=True)]
    return written
