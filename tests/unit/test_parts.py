"""Memory by part of the model: what is born in a part's forward or backward is that part's, and nothing is lost."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_test.core.config import ExperimentConfig
from memory_test.core.measure import measure_memory
from memory_test.core.parts import parts_told
from memory_test.core.schema import Repeat
from memory_test.core.workload import build_model
from memory_test.predict.predict import imagined_run, predict_memory

SMALL: dict[str, dict[str, Any]] = {
    "x2": {"model": "DiT-S/2", "depth": 2, "hidden_size": 64, "num_heads": 2, "model_options": ("x2_width=48",)},
    "set": {"depth": 1, "hidden_size": 48, "num_heads": 3, "image_size": 16},
    "ddt": {"model": "DDT-S", "in_channels": 16, "image_size": 8, "model_options": ("depth=[1,1]",)},
    "panda": {"depth": 1, "image_size": 32, "hidden_size": 16, "num_heads": 2},
}


class Two(nn.Module):
    """Two parts of one layer each, and a sum between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def parameter_groups(self) -> dict[str, list[str]]:
        names = [name for name, _ in self.named_parameters()]
        return {part: [name for name in names if name.startswith(part)] for part in ("first", "second")}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) + 1)
        return out


def told(model: nn.Module, run: Any) -> list[str | None]:
    parts: list[str | None] = []
    with parts_told(model, parts.append):
        run()
    return parts


def test_parts_are_told_as_they_begin_forward_and_backward() -> None:
    model, x = Two(), torch.ones(2, 4)
    there = ["first", None, "second", None]
    assert told(model, lambda: model(x)) == there
    assert told(model, lambda: model(x).sum().backward()) == [*there, "second", "first"]
    assert told(nn.Linear(4, 4), lambda: model(x)) == []


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    model = Two()

    def run() -> None:
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 5))
        model(torch.ones(2, 4))

    assert told(model, run)[-4:] == ["first", None, "second", None]


def measured(experiment: str, **values: Any) -> tuple[dict[str, Any], Repeat]:
    config = ExperimentConfig(experiment=experiment, batch_size=2, device="cpu", **values)
    resolved = config.resolve(device="cpu", num_threads=1)
    return resolved, measure_memory(resolved, lambda phase: None).repeat


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["vanilla", "bookkeeping"])
def test_a_prediction_and_a_measurement_agree_on_parts(method: str, name: str) -> None:
    """Within what operations take inside, which only the measurement sees."""
    resolved, repeat = measured(method, workload=name, **SMALL[name])
    by_part = repeat.breakdown_by_part
    groups = build_model(resolved).parameter_groups()  # type: ignore[operator]
    assert set(by_part) == {*groups, "elsewhere"}
    for part, names in groups.items():
        sizes = [4 * build_model(resolved).get_parameter(each).numel() for each in names]
        assert by_part[part]["parameters"] == sum(sizes)
    predicted = predict_memory(imagined_run(resolved, None), None).repeat.breakdown_by_part
    peak = repeat.peak_allocated_bytes
    assert peak is not None
    for part, kinds in by_part.items():
        for category in ("saved_activations", "kept_for_clipping", "gradients", "optimizer_state"):
            assert abs(kinds.get(category, 0) - predicted[part].get(category, 0)) <= 0.01 * peak, (part, category)


def test_a_frozen_backbone_keeps_nothing() -> None:
    """Fused at the end alone, no gradient passes through the backbone, so that nothing of it is saved."""
    _, frozen = measured("vanilla", workload="x2", **SMALL["x2"])
    _, full = measured("vanilla", workload="x2", **SMALL["x2"], train="full")
    kept = {
        train: r.breakdown_by_part["backbone"].get("saved_activations", 0)
        for train, r in [("x2", frozen), ("full", full)]
    }
    assert kept["full"] > 2**20
    assert kept["x2"] < 0.1 * kept["full"]
    assert frozen.breakdown_by_part["backbone"].get("gradients", 0) == 0
