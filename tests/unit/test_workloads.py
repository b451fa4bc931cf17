"""Workloads: what a choice becomes, and what is refused in one line."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from dit_dp.errors import UsageError
from dit_dp.models import FAMILIES
from dit_dp.workloads import WORKLOADS, WorkloadConfig, build_model, build_objective, input_shape, stored_spec

SMALL: dict[str, dict[str, Any]] = {
    "dit": {"model": "DiT-S/2", "depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 32, "num_classes": 5},
    "x2": {
        "model": "DiT-S/2",
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "image_size": 32,
        "model_options": ("x2_width=null", "x2_num_heads=2"),
    },
    "set": {"hidden_size": 16, "depth": 1, "num_heads": 2, "image_size": 8, "model_options": ("sample_size=3",)},
    "ddt": {
        "model": "DDT-S",
        "in_channels": 6,
        "image_size": 8,
        "model_options": ("hidden_size=[16,24]", "depth=[1,1]", "num_heads=[2,2]"),
    },
    "panda": {"hidden_size": 8, "depth": 1, "num_heads": 2, "image_size": 16},
}


def test_every_family_is_of_one_workload() -> None:
    assert sorted(workload.family for workload in WORKLOADS.values()) == sorted(FAMILIES)


@pytest.mark.parametrize("name", SMALL)
def test_a_choice_becomes_a_model_with_losses_by_unit(name: str) -> None:
    spec = WorkloadConfig(workload=name, **SMALL[name]).spec
    torch.manual_seed(0)
    model, objective = build_model(spec), build_objective(spec)
    labels = None if spec.num_classes is None else torch.zeros(2, dtype=torch.int64)
    batch = objective.draw(torch.randn(2, *input_shape(spec)), labels)
    assert objective(model, batch).shape == (2,)


def test_defaults_are_the_authors() -> None:
    specs = {name: WorkloadConfig(workload=name).spec for name in WORKLOADS}
    assert {name: spec.num_tokens for name, spec in specs.items()} == {
        "dit": 256,
        "diffusers": None,
        "x2": 256,
        "set": 256,
        "ddt": 256,
        "panda": 4096,
    }
    assert specs["ddt"].objective.shift == pytest.approx((768 * 256 / 4096) ** 0.5)
    assert specs["x2"].train == "x2"
    assert specs["set"].objective.rows_per_unit == 6


def test_pixels_are_grey_or_coloured() -> None:
    for channels in (1, 3):
        spec = WorkloadConfig(workload="dit", in_channels=channels, image_size=28, patch_size=7).spec
        assert (input_shape(spec), spec.num_tokens, spec.in_latents) == ((channels, 28, 28), 16, False)


def test_a_variational_set_model_is_given_its_context_noise() -> None:
    options = (*SMALL["set"]["model_options"], "variational=true", "conditioning=lag")
    spec = WorkloadConfig(workload="set", **SMALL["set"] | {"model_options": options}).spec
    assert spec.objective.context_shape == build_model(spec).context_shape == (16, 16)


def test_an_objective_is_changed_by_name() -> None:
    spec = WorkloadConfig(workload="ddt", objective=("path=additive", "target=eps", "times=uniform", "shift=1")).spec
    assert (spec.objective.path, spec.objective.target, spec.objective.shift) == ("additive", "eps", 1.0)


@pytest.mark.parametrize(
    ("workload", "changes", "said"),
    [
        ("dot", {}, "workload: got 'dot'"),
        ("dit", {"model": "DDT-S"}, "model: got 'DDT-S'"),
        ("dit", {"in_channels": 5}, "in_channels: got 5"),
        ("panda", {"in_channels": 4}, "takes pixels only"),
        ("set", {"num_classes": 10}, "takes no labels"),
        ("panda", {"class_dropout_prob": 0.1}, "no null label"),
        ("ddt", {"learn_sigma": True}, "predicts no variances"),
        ("ddt", {"hidden_size": 384}, "encoder and decoder have one each"),
        ("diffusers", {"depth": 2}, "the checkpoint says it"),
        ("x2", {"model_options": ("x2_fuse=1",)}, "model_options: got 'x2_fuse'"),
        ("x2", {"model_options": ("x2_fuse_every",)}, "NAME=VALUE"),
        ("x2", {"model_options": ("x2_fuse_every=often",)}, "x2_fuse_every: got 'often'"),
        ("x2", {"model_options": ("x2_fuse_every=1", "x2_fuse_every=2")}, "each name once"),
        ("dit", {"objective": ("set_size=2",)}, "objective: got 'set_size'"),
        ("dit", {"objective": ("path=arc",)}, "path: got 'arc'"),
        ("dit", {"train": "half"}, "train: got 'half'"),
        ("dit", {"image_size": 100}, "image_size: got 100"),
    ],
)
def test_what_does_not_fit_is_named(workload: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as raised:
        WorkloadConfig(workload=workload, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "diffusers"])
def test_a_specification_comes_back_from_json(name: str) -> None:
    spec = WorkloadConfig(workload=name).spec
    again = stored_spec(json.loads(json.dumps(dataclasses.asdict(spec))))
    assert again == spec
    assert {key: type(value) for key, value in again.arguments.items()} == {
        key: type(value) for key, value in spec.arguments.items()
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "other"}, "spec.name"),
        ({"image_size": "32"}, "image_size"),
        ({"more": 1}, "more"),
        ({"objective": {}}, "spec.objective"),
        ({"objective": None}, "spec.objective"),
    ],
)
def test_a_specification_of_another_version_is_refused(change: dict[str, Any], words: str) -> None:
    plain = dataclasses.asdict(WorkloadConfig().spec) | change
    with pytest.raises(UsageError, match=words) as caught:
        stored_spec(plain)
    assert "\n" not in str(caught.value)
