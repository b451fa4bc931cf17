"""Reports of several workloads: groups are told apart, and memory is shown by part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_test.core.schema import Record
from memory_test.core.units import MIB
from memory_test.report.frames import groups, load_frame
from memory_test.report.markdown import markdown_report
from memory_test.report.parts import parts_of
from memory_test.report.plates import plates
from memory_test.report.systems import naive_attention_bytes, systems_page
from memory_test.sweep.grid import find_sweep, load_sweep
from tests.factories import record, write_folder


def of(method: str, parts: dict[str, dict[str, int]] | None = None, **changes: Any) -> Record:
    made = record(method, 2, **changes)
    counts = {"num_parameters": 33_000_000, "num_trainable_parameters": 2_000_000}
    return replace(made, breakdown_by_part=parts or {}, choices=counts)


SAVED = {"saved_activations": 30 * MIB, "parameters": 7 * MIB}
KEPT = {"saved_activations": 10 * MIB, "kept_for_clipping": 4 * MIB, "per_example_gradients": 1 * MIB}
PARTS = {"backbone": SAVED, "head": KEPT, "elsewhere": {"input": MIB}}
TWICE = {part: {name: 2 * size for name, size in sizes.items()} for part, sizes in PARTS.items()}
X2: dict[str, Any] = {"workload": "x2", "model": "DiT-S/2"}
ALL = [
    of("vanilla", model="DiT-S/2"),
    of("vanilla", PARTS, **X2),
    of("ghost", PARTS, **X2),
    of("vanilla", TWICE, **X2, train="full"),
    of("vanilla", **X2, model_options=["x2_fuse_every=1"]),
    of("ghost", workload="set"),
    of("ghost", workload="ddt", model="DDT-S"),
    of("ghost", workload="panda"),
]


def test_titles_tell_workloads_apart(tmp_path: Path) -> None:
    titles = {group.title for group in groups(load_frame(write_folder(tmp_path, ALL)))}
    size, precision = "256 px, 4 channels, 256 tokens", "float32"
    assert titles == {
        f"DiT-S/2 · {size} · {precision}",
        f"x2 DiT-S/2 · {size} · {precision} · train x2 · x2_fuse_every 0",
        f"x2 DiT-S/2 · {size} · {precision} · train full · x2_fuse_every 0",
        f"x2 DiT-S/2 · {size} · {precision} · train x2 · x2_fuse_every 1",
        f"Set/2 · 32 px, 3 channels, 256 tokens · {precision}",
        f"DDT-S/1 · 224 px, 768 channels, 256 tokens · {precision}",
        f"Panda/4 · 256 px, 3 channels, 4096 tokens · {precision}",
    }


def test_memory_by_part_is_told_and_drawn(tmp_path: Path) -> None:
    frame = load_frame(write_folder(tmp_path, ALL[:3]))
    text = markdown_report(frame)
    assert text.count("### By part of the model") == 1
    assert "| ghost | 2 | 30.00 MiB | 10.00 MiB + 5.00 MiB | 0 B |" in text
    for group in groups(frame):
        drawn = [plate for plate in plates(group) if "by part" in plate.title]
        assert len(drawn) == (group.config["workload"] == "x2")
        assert parts_of(group.rows) == (["backbone", "head", "elsewhere"] if drawn else [])
        for plate in drawn:
            assert plate.numbers
            labels = {text.get_text() for text in plate.figure.legends[0].get_texts()}
            assert labels == {"backbone", "head", "elsewhere"}


def test_systems_side_by_side(tmp_path: Path) -> None:
    page = systems_page(load_frame(write_folder(tmp_path, ALL)))
    assert "| x2 DiT-S/2, T = 256 | x2: 2.00 M of 33.00 M | 2 |" in page
    assert "| x2 DiT-S/2, T = 256 fused after every block |" in page
    assert "| x2: 2.00 M of 33.00 M | 40.00 MiB | backbone 75%, head 25% | 0.50 |" in page
    assert "| full: 2.00 M of 33.00 M | 80.00 MiB | backbone 75%, head 25% | 1.00 |" in page
    assert "| Set/2, T = 256 | full: 2.00 M of 33.00 M | 2 × 6 rows |" in page


def test_what_naive_attention_takes() -> None:
    found = [of("vanilla", {"a": {"saved_activations": size}}, workload="panda") for size in (18 * MIB, 6 * MIB)]
    assert naive_attention_bytes(*found) == 2 * MIB  # of a batch of 2 and 3 layers


@pytest.mark.parametrize("name", ["dit", "x2", "set", "ddt", "panda"])
def test_the_shipped_sweep_has_every_system(name: str) -> None:
    cells = [cell for cell in load_sweep(find_sweep(Path("workloads"))).cells if cell.workload == name]
    assert {"vanilla", "auto", "bookkeeping", "ghost"} <= {cell.experiment for cell in cells}
