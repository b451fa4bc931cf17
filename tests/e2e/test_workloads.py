"""`--workload` in every command: what it prints and records, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from memory_test.cli import main
from memory_test.core import store
from memory_test.sweep.grid import load_sweep

_TINY = {
    "x2": "--model DiT-S/2 --depth 1 --hidden-size 32 --num-heads 2 --image-size 64 --model-options x2_width=32",
    "set": "--depth 1 --hidden-size 24 --num-heads 3 --image-size 8 --model-options sample_size=3",
    "ddt": "--model DDT-S --in-channels 8 --image-size 4 --model-options hidden_size=[24,48] depth=[1,1]",
    "panda": "--depth 1 --hidden-size 8 --num-heads 2 --image-size 16",
}
TINY = {name: words.split() for name, words in _TINY.items()}


def call(*words: Any) -> int:
    return main([str(word) for word in words])


def test_a_run_says_its_units_and_what_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--train", "encoder_then_full(9)", "--batch-size", 2, "--num-iter", 1, "--warmup", 0, "--num-threads", 1)
    command = ("run", "--workload", "set", *TINY["set"], "--experiment", "bookkeeping", *rest)
    assert call(*command, "--output", tmp_path / "r.json") == 0
    said = capsys.readouterr().err
    assert "batch 2 of 3 rows each" in said
    assert "trains encoder (encoder_then_full(9))" in said
    record = store.load(tmp_path / "r.json")
    resolved = record.config_resolved
    assert (resolved["unit"], resolved["rows_per_unit"], resolved["trained_groups"]) == ("set", 3, ["encoder"])
    assert 0 < record.choices["num_trainable_parameters"] < record.choices["num_parameters"]
    assert record.breakdown_by_part["dit"].get("optimizer_state", 0) == 0
    assert record.breakdown_by_part["encoder"]["optimizer_state"] > 0


def test_phases_are_recorded_as_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = "encoder:1-5,dit+encoder:6-9,full:10-"
    rest = ("--experiment", "ghost", "--train", train, "--num-iter", 1, "--warmup", 0, "--num-threads", 1)
    assert call("run", "--workload", "set", *TINY["set"], *rest, "--output", tmp_path / "r.json") == 0
    assert f"trains encoder ({train})" in capsys.readouterr().err
    resolved = store.load(tmp_path / "r.json").config_resolved
    assert (resolved["train"], resolved["trained_groups"]) == (train, ["encoder"])


def test_an_unknown_group_is_a_mistake_in_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--experiment", "ghost", "--train", "encoder:1-5,encodr:6-", "--output", tmp_path / "r.json")
    assert call("run", "--workload", "set", *TINY["set"], *rest) == 2
    assert "memory-test: error: group of SetDiT: got 'encodr'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("name", ["set", "ddt"])
def test_predict_and_plan(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = ("--workload", name, *TINY[name])
    assert call("predict", *workload, "--experiment", "ghost", "--output", tmp_path / "r.json") == 0
    assert f"the workload {name}" in capsys.readouterr().out
    assert store.load(tmp_path / "r.json").config_resolved["workload"] == name
    assert call("plan", *workload, "--batch-size", 8, "--methods", "bookkeeping") == 0
    out = capsys.readouterr().out
    assert "recommended: bookkeeping" in out
    assert f"--workload {name}" in out


@pytest.mark.parametrize("name", TINY)
def test_inspect_and_doctor(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", "--json", "--workload", name, *TINY[name]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shapes_unknown"] is None
    ours = {verdict["method"]: verdict["supported"] for verdict in found["methods"] if not verdict["peer"]}
    assert all(ours.values()), ours
    sizes = TINY[name][2:] if "--model" in TINY[name] else TINY[name]  # the smallest is the doctor's own choice
    code = call("doctor", "--workload", name, *sizes, "--methods", "bookkeeping")
    assert code == 0, capsys.readouterr().out


def test_a_sweep_takes_workloads(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "base: {workload: x2, model: DiT-S/2, batch_size: 2}\n"
        "grid: {experiment: [vanilla, ghost], train: [x2, full]}\n"
        "cells: [{workload: set, model: Set/2, experiment: auto, model_options: [sample_size=3]},\n"
        "  {workload: set, model: Set/2, experiment: auto, train: 'encoder:1-9,full:10-'}]\n"
    )
    cells = load_sweep(path).cells
    assert [(cell.workload, cell.experiment, cell.train) for cell in cells] == [
        ("x2", "vanilla", "x2"),
        ("x2", "vanilla", "full"),
        ("x2", "ghost", "x2"),
        ("x2", "ghost", "full"),
        ("set", "auto", None),
        ("set", "auto", "encoder:1-9,full:10-"),
    ]
    assert cells[-2].spec.objective.set_size == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --experiment ghost --workload dot", "workload: got 'dot'"),
        ("run --experiment ghost --workload panda --in-channels 4", "in_channels: got 4"),
        ("predict --experiment ghost --workload set --in-channels 4", "takes pixels only"),
        ("run --experiment ghost --workload panda --data digits", "num_classes: got 1; accepted: >= 10"),
        ("run --experiment opacus --workload set", "a unit here has 6"),
        ("plan --workload x2 --train head(2)", "train: got 'head(2)'"),
        ("inspect --workload set --train encoder_then_full(0)", "train: got 'encoder_then_full(0)'"),
        ("predict --gpu cpu --experiment ghost --workload panda --depth 1 --image-size 16 --train x2", "got 'x2'"),
        ("inspect --workload set --train x2", "group of SetDiT: got 'x2'"),
        ("doctor --workload dit --train encoder_then_full(5)", "group of DiT: got 'encoder'"),
        ("run --workload set --experiment ghost --train encoder:1-5,full:5-", "got 5; accepted: 6; they overlap"),
        ("predict --workload set --experiment ghost --train encoder:1-5,full:8-", "got 8; accepted: 6"),
        ("plan --workload set --train :1-5,full:6-", "a phase that trains nothing"),
        ("doctor --workload set --train encoder:5-3,full:6-", "the phase starts at step 5"),
        ("inspect --workload set --train encoder:1-5,full", "train: got 'full'; accepted: phases such as"),
        ("inspect --workload set --train encoder:1-5,encodr:6-", "group of SetDiT: got 'encodr'"),
        ("predict --gpu cpu --experiment ghost --workload panda --depth 1 --train head:1-5,hed:6-", "got 'hed'"),
        ("doctor --workload set --train encodr:1-5,full:6-", "group of SetDiT: got 'encodr'"),
        ("inspect --workload set --model-options sample_size=1", "set_size: got 1"),
        ("inspect --workload ddt --image-size 100", "image_size: got 100"),
    ],
)
def test_a_mistake_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("memory-test: error: ")]
    assert len(lines) == 1
    assert lines[0] == captured.err.splitlines()[-1]
