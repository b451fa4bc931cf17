"""Runs whose first steps would be noise alone are warned of, and no others."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_dp.models.dit import randomize_zero_init_
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.reach import warn_of_noise_alone
from dit_dp.trainer.run import run
from dit_dp.workloads import build_model, build_objective

SMALL: dict[str, dict[str, Any]] = {
    "dit": {"in_channels": 3, "num_classes": 10},
    "x2": {"in_channels": 3, "num_classes": 10, "model_options": ("x2_width=16", "x2_num_heads=2")},
    "set": {},
}


def config(workload: str, train: str, **more: Any) -> TrainConfig:
    sizes = {"image_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2}
    if workload != "set":
        sizes["patch_size"] = 2
        more["model"] = "DiT-S/2"
    known = {"data": "digits", "noise_multiplier": 1.0, "steps": 2, "device": "cpu", "method": "bookkeeping"}
    return TrainConfig(workload=workload, train=train, **{**known, **sizes, **SMALL[workload], **more})


@pytest.mark.parametrize(
    ("workload", "train", "said"),
    [
        ("set", "encoder_then_full(5)", "steps 1 to 5 release noise alone: no gradient reaches encoder"),
        ("dit", "attention", "every step releases noise alone: no gradient reaches attention"),
        ("dit", "adaln", "every step releases noise alone: no gradient reaches adaln"),
        ("dit", "head", None),
        ("dit", "bias_norm", None),
        ("dit", "full", None),
        ("x2", "x2", None),
    ],
)
def test_only_what_nothing_reaches_is_warned_of(
    workload: str, train: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    spec = config(workload, train).spec
    torch.manual_seed(0)
    model, objective = build_model(spec), build_objective(spec)
    with caplog.at_level(logging.WARNING):
        assert warn_of_noise_alone(model, objective, spec) == (said is not None)
    if said is None:
        assert caplog.messages == []
    else:
        (line,) = caplog.messages
        assert said in line
        assert "--train full" in line
        assert "weight" in line
    assert not warn_of_noise_alone(randomize_zero_init_(model), objective, spec)
    assert all(p.grad is None for p in model.parameters())


def test_a_run_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = config("dit", "attention", output_dir=tmp_path, batch_size=8, num_samples=0)
    with caplog.at_level(logging.WARNING):
        run(asked)
    assert sum("noise alone" in line for line in caplog.messages) == 1
