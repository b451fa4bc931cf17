"""The campaign as a command, and one step of it measured for real, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memory_test.campaign.budget import Budget, Pace
from memory_test.campaign.campaign import Outcome, Site
from memory_test.campaign.cases import Trial, run_trials
from memory_test.campaign.parts import PARTS
from memory_test.core.environment import capture
from memory_test.predict.emulator.cases import Case

ROOT = Path(__file__).resolve().parents[2]
TINY = {"model": "DiT-S/2", "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 64, "num_threads": 1}


def test_without_a_gpu_the_command_ends_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memory_test.campaign", "--output-dir", str(tmp_path / "d")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gpu-campaign: error: device: got 'no CUDA device'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_a_part_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(changes={"experiment": "ghost", "batch_size": 2, **TINY})
    part = next(part for part in PARTS if part.name == "prediction")
    site = Site(root=tmp_path, card="H100-80GB", environment=capture("cpu"), say=lambda text: None)
    for _ in range(2):
        found = run_trials([Trial(case, device="cpu")], part, site, Pace(Budget(600), 1))
        assert found == Outcome(done=1, left=0)
        monkeypatch.setattr("memory_test.campaign.cases.work", lambda *given: pytest.fail("measured twice"))
    (path,) = (tmp_path / "prediction").glob("*.json")
    result = json.loads(path.read_text())
    assert result["status"] == "ok"
    assert result["peaks"]["peak_allocated_bytes"] > result["changes"]["batch_size"] * 64 * 64
    assert result["environment"]["torch_version"] == capture("cpu").torch_version
    assert {"forward", "backward", "clip", "optimizer"} <= set(result["phases"])
