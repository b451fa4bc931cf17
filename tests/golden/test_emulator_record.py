"""The committed comparison with the emulated CUDA runtime keeps what is promised of predictions."""

import json
from pathlib import Path
from typing import Any

import pytest

from dit_dp.clipping import METHODS
from memory_test.predict.emulator.cases import CASES
from memory_test.predict.emulator.edges import EDGES
from memory_test.predict.emulator.record import summary

FOLDER = Path(__file__).resolve().parents[2] / "results" / "prediction"

MOST = {
    "first_step_peak_allocated_bytes": (0.0005, 0.005),
    "peak_allocated_bytes": (0.0005, 0.005),
    "peak_reserved_bytes": (0.003, 0.03),
}
"""By peak: the largest median and the largest worst relative error."""


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "emulator.json").read_text(encoding="utf-8"))
    return found


def test_it_is_of_the_configurations_that_the_check_names(record: dict[str, Any]) -> None:
    assert [each["name"] for each in record["configurations"]] == [case.name for case in CASES]
    assert [each["name"] for each in record["edges"]] == [edge.case.name for edge in EDGES]
    assert record["summary"]["count"] == len(CASES) >= 60
    assert {each["changes"]["experiment"] for each in record["configurations"]} == set(METHODS)


def test_its_summary_follows_from_its_entries(record: dict[str, Any]) -> None:
    assert summary(record["configurations"], record["edges"]) == record["summary"]
    for each in record["configurations"]:
        for name, error in each["relative_errors"].items():
            assert error == each["predicted"][name] / each["emulated"][name] - 1


@pytest.mark.parametrize("peak", MOST)
def test_predictions_are_as_close_as_promised(record: dict[str, Any], peak: str) -> None:
    median, worst = MOST[peak]
    assert record["summary"][peak]["median_relative_error"] <= median
    assert record["summary"][peak]["worst_relative_error"] <= worst


def test_the_allocators_model_did_the_same_in_every_setting(record: dict[str, Any]) -> None:
    assert record["summary"]["allocator_actions"] > 100_000
    assert record["summary"]["allocator_runs_that_differ"] == 0
    options = " ".join(each["allocator"]["options"] for each in record["configurations"])
    for option in ("expandable_segments", "max_split_size_mb", "garbage_collection_threshold"):
        assert option in options


def test_the_largest_batch_is_within_one_and_never_too_large(record: dict[str, Any]) -> None:
    edges = record["summary"]["edges"]
    assert edges["count"] >= 6
    assert -1 <= edges["lowest_difference"] <= edges["highest_difference"] <= 0
    assert record["summary"]["choices_that_differ"] == 0


def test_it_says_where_it_is_from_and_what_it_is_not(record: dict[str, Any]) -> None:
    assert record["emulated_packages"]["torch"].startswith("2.11.")
    assert record["environment"]["commit"]
    assert record["environment"]["dirty"] is False
    assert record["card"]["num_sms"] == 132
    assert any("A real GPU" in line for line in record["not_covered"])
    assert (FOLDER / "emulator.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert (FOLDER / "emulator.png").read_bytes().startswith(b"\x89PNG")
