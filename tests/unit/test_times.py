"""The scripts that time the product's own promises: what they write, and that a failure is not taken for a time."""

import json
from pathlib import Path

import pytest

from memory_test.diffusion_profile import prediction_times, privacy_times


def test_draws_and_searches_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_times, "NUM_RECORDS", 1000)
    monkeypatch.setattr(privacy_times, "BUDGETS", privacy_times.BUDGETS[2:3])
    privacy_times.main(tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["sample_rate"] for row in record["draws"]] == list(privacy_times.RATES)
    for row in record["draws"]:
        assert len(row["seconds"]) == privacy_times.DRAWS
        assert 0 < row["median_s"] <= max(row["seconds"])
        first, last = row["peak_bytes"]
        assert last <= 2 * first, "memory grows with the draws"
    (search,) = record["noise_multipliers"]
    assert search["noise_multiplier"] > 0.5
    assert search["seconds"] > 0


def test_a_command_is_timed_and_its_failure_is_an_error() -> None:
    found = prediction_times.command("cards")
    assert found["command"] == ["memory-test", "cards"]
    assert found["seconds"] > 0
    assert found["peak_resident_bytes"] > 2**20
    with pytest.raises(RuntimeError, match="experiment: got 'nothing'"):
        prediction_times.command("predict", "--experiment", "nothing")
