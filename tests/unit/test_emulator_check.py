"""The comparison with the emulated runtime, but for the runtime."""

from pathlib import Path
from typing import Any

import pytest

from dit_dp.clipping import METHODS
from memory_test.core.units import MIB
from memory_test.predict.allocator import Block, CachingAllocator
from memory_test.predict.emulator.cases import CASES, allocator_options
from memory_test.predict.emulator.edges import EDGES, largest
from memory_test.predict.emulator.events import compare
from memory_test.predict.emulator.figure import scatter
from memory_test.predict.emulator.record import entry, summary
from memory_test.predict.emulator.sides import Kept
from memory_test.predict.settings import AllocatorSettings

SETTINGS = [
    AllocatorSettings(),
    AllocatorSettings(expandable_segments=True),
    AllocatorSettings(max_split_bytes=32 * MIB),
]
CAPACITY = 160 * MIB


def test_configurations_are_many_different_and_of_every_method() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
    assert {case.changes["experiment"] for case in CASES} == set(METHODS)
    assert all(edge.at(3).resolved()["batch_size"] == 3 for edge in EDGES)
    assert len({edge.name(1) for edge in EDGES}) == len(EDGES) >= 6


def test_allocator_options_are_torchs() -> None:
    settings = AllocatorSettings(expandable_segments=True, max_split_bytes=64 * MIB, garbage_collection_threshold=0.6)
    assert allocator_options(settings) == (
        "expandable_segments:True,max_split_size_mb:64,garbage_collection_threshold:0.6"
    )
    assert allocator_options(AllocatorSettings()) == ""


@pytest.mark.parametrize("answer", [0, 1, 2, 7, 40, 41])
@pytest.mark.parametrize("start", [1, 7, 40])
def test_largest_finds_the_edge_from_anywhere(answer: int, start: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= answer

    assert largest(fits, start) == answer
    assert min(asked) >= 1
    assert len(asked) == len(set(asked))


def history(settings: AllocatorSettings, base: int) -> list[dict[str, Any]]:
    """Return what an allocator like ours would write, at other addresses, for requests that fill the card."""
    entries: list[dict[str, Any]] = []

    def record(action: str, address: int, num_bytes: int) -> None:
        name = "free_completed" if action == "free" else action
        if action == "free":
            entries.append({"action": "free_requested", "addr": address + base, "size": num_bytes})
        entries.append({"action": name, "addr": address + base, "size": num_bytes})

    allocator = CachingAllocator(settings, CAPACITY, record)
    blocks: list[Block] = []
    for size in (512, 3 * MIB, 700, 40 * MIB, 21 * MIB):
        blocks.append(allocator.malloc(size))
    for place in (3, 1, 0):
        allocator.free(blocks.pop(place))
    blocks += [allocator.malloc(size) for size in (30 * MIB, 70 * MIB, 9 * MIB)]
    return entries


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_allocator_that_does_the_same_does_not_differ(settings: AllocatorSettings) -> None:
    entries = history(settings, base=7 << 40)
    actions, difference = compare(entries, settings, CAPACITY)
    assert difference is None
    assert actions == sum(each["action"] != "free_requested" for each in entries)


def test_the_first_action_that_differs_is_named() -> None:
    entries = history(AllocatorSettings(), base=0)
    index = next(i for i, each in enumerate(entries) if each["action"] == "segment_alloc")
    entries[index] = {**entries[index], "size": 4 * MIB}
    _, difference = compare(entries, AllocatorSettings(), CAPACITY)
    assert difference is not None
    assert difference.startswith("action 0: ('segment_alloc'")
    assert compare(history(AllocatorSettings(), 0), SETTINGS[1], CAPACITY)[1] is not None


def test_kept_results_are_not_computed_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert kept.get("emulated", "a", lambda: {"status": "ok"})["status"] == "ok"
    assert kept.get("emulated", "a", dict)["status"] == "ok"
    assert "status" not in kept.get("predicted", "a", dict)


def result(allocated: int, reserved: int) -> dict[str, Any]:
    peaks = {
        "first_step_peak_allocated_bytes": allocated,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
    }
    return {
        "peaks": peaks,
        "phases": {"forward": [allocated, reserved]},
        "choices": {"attention_kernels": []},
        "retries": 0,
        "actions": 5,
        "first_difference": None,
        "seconds": 1.0,
    }


def test_the_summary_and_the_figure_say_what_the_entries_do() -> None:
    entries = [
        entry(CASES[0], result(1000 * MIB, 2000 * MIB), result(1010 * MIB, 2000 * MIB)),
        entry(CASES[1], result(1000 * MIB, 2000 * MIB), result(1000 * MIB, 1900 * MIB)),
        entry(CASES[2], result(1000 * MIB, 2000 * MIB), result(999 * MIB, 2000 * MIB)),
    ]
    found = summary(entries, [{"predicted": 4, "emulated": 5}])
    assert found["count"] == 3
    assert found["peak_allocated_bytes"]["median_relative_error"] == pytest.approx(0.001)
    assert found["peak_allocated_bytes"]["worst_relative_error"] == pytest.approx(0.01)
    assert found["peak_reserved_bytes"]["worst_relative_error"] == pytest.approx(0.05)
    assert found["edges"] == {"count": 1, "lowest_difference": -1, "highest_difference": -1}
    figure = scatter({"configurations": entries, "summary": found})
    assert "worst 5.00 %" in "".join(text.get_text() for text in figure.axes[0].texts)
