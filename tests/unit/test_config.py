"""A configuration is checked where it is made and resolved before it runs."""

import json

import pytest

from dit_dp.errors import UsageError
from dit_dp.workloads import WORKLOADS
from memory_test.core.config import DECIDED, DERIVED, ExperimentConfig
from memory_test.sweep.summary import describe_cell
from memory_test.sweep.sweep import file_name


def resolve(**values: object) -> dict[str, object]:
    config = ExperimentConfig(**{"experiment": "ghost", **values})  # type: ignore[arg-type]
    return config.resolve(device="cpu", num_threads=2)


def test_four_channels_are_latents() -> None:
    resolved = resolve(image_size=256, in_channels=4)
    assert (resolved["latent_downsample"], resolved["latent_size"], resolved["num_tokens"]) == (8, 32, 256)


def test_three_channels_are_pixels() -> None:
    resolved = resolve(image_size=256, in_channels=3)
    assert (resolved["latent_downsample"], resolved["latent_size"], resolved["num_tokens"]) == (1, 256, 16384)


def test_latents_can_be_fed_at_full_size() -> None:
    assert resolve(image_size=256, in_channels=4, latent_downsample=1)["num_tokens"] == 16384


def test_patch_size_given_replaces_the_names() -> None:
    resolved = resolve(model="DiT-XL/2", patch_size=8)
    assert (resolved["model"], resolved["patch_size"], resolved["num_tokens"]) == ("DiT-XL/8", 8, 16)


def test_sizes_come_from_the_name_unless_given() -> None:
    resolved = resolve(model="DiT-B/4", depth=3)
    assert (resolved["depth"], resolved["hidden_size"], resolved["num_heads"]) == (3, 768, 12)
    assert resolved["model"] == "DiT-B/4 (depth 3)"
    assert resolve(model="DiT-B/4", depth=12)["model"] == "DiT-B/4"


def test_the_baseline_has_no_noise() -> None:
    assert resolve(experiment="vanilla")["noise_multiplier"] == 0.0
    assert resolve(experiment="ghost")["noise_multiplier"] == 1.0


def test_defaults_become_explicit() -> None:
    resolved = resolve()
    left = {"memory_limit_gib", "memory_budget_gib"}
    assert [name for name, value in resolved.items() if value is None and name not in left] == []
    assert resolved["optimizer_impl"] == "for-loop"
    assert ExperimentConfig(experiment="ghost").resolve(device="cuda", num_threads=1)["optimizer_impl"] == "foreach"


def test_a_users_model_decides_its_sizes() -> None:
    resolved = resolve(model="package.module:build", batch_size=7, dtype="bf16", compile=True)
    for name in (*DECIDED, *DERIVED):
        assert resolved[name] is None
    assert (resolved["model"], resolved["batch_size"], resolved["dtype"]) == ("package.module:build", 7, "bf16")
    config = ExperimentConfig(experiment="ghost", model="package.module:build", batch_size=7)
    assert describe_cell(config) == "ghost: package.module:build, batch 7, float32"
    assert file_name(config, "cpu").startswith("ghost-package.module-build-b7-float32-")
    assert ExperimentConfig(experiment="ghost", model="hub:name", pretrained=True).is_custom is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 64), ("patch_size", 2), ("in_channels", 3), ("latent_downsample", 1), ("hidden_size", 64),
        ("depth", 2), ("num_heads", 2), ("num_classes", 10), ("class_dropout_prob", 0.0), ("learn_sigma", False),
        ("activation_checkpointing", True), ("data", "digits"), ("workload", "x2"), ("train", "head"),
        ("model_options", ("mlp_ratio=2.0",)), ("objective", ("multiplicity=2",)),
    ],
)  # fmt: skip
def test_what_a_users_model_decides_is_refused(name: str, value: object) -> None:
    assert name in DECIDED
    with pytest.raises(UsageError, match=f"^{name}: got .*accepted: no value; a:b decides it; drop the option$"):
        resolve(model="a:b", **{name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": ":build"}, ["model", "module:callable"]),
        ({"model": "a-b:build"}, ["model", "module:callable"]),
        ({"experiment": "vanila"}, ["experiment", "'vanila'", "vanilla, "]),
        ({"model": "DiT-M/2"}, ["model", "'DiT-M/2'", "DiT-XL/2"]),
        ({"memory_budget_gib": 0.0}, ["memory_budget_gib", "0.0", "> 0"]),
        ({"memory_budget_gib": 1.0}, ["memory_budget_gib", "1.0", "ghost takes no memory budget"]),
        ({"in_channels": 2}, ["in_channels", "3 (RGB pixels), 4 (VAE latents)"]),
        ({"image_size": 250}, ["image_size", "250", "multiple of 8"]),
        ({"image_size": 264, "patch_size": 2}, ["image_size", "multiple of 16"]),
        ({"batch_size": 0}, ["batch_size", "0", ">= 1"]),
        ({"batch_size": True}, ["batch_size"]),
        ({"learning_rate": "1e-4"}, ["learning_rate", "1.0e-4"]),
        ({"noise_multiplier": float("nan")}, ["noise_multiplier", "finite"]),
        ({"max_grad_norm": 0.0}, ["max_grad_norm", "> 0"]),
        ({"class_dropout_prob": 1.5}, ["class_dropout_prob", "0 to 1"]),
        ({"data": "digits"}, ["data", "--in-channels 3"]),
        ({"pretrained": True, "in_channels": 3}, ["in_channels", "4-channel"]),
        ({"experiment": "opacus", "activation_checkpointing": True}, ["opacus", "vanilla, "]),
        ({"experiment": "opacus-ew", "compile": True}, ["compile", "opacus-ew", "vanilla, "]),
        ({"experiment": "opacus-ew", "dtype": "bf16"}, ["dtype", "float32"]),
        ({"hidden_size": 100, "num_heads": 16}, ["hidden_size", "multiple of 16"]),
        ({"workload": "dot"}, ["workload", "'dot'", "panda"]),
        ({"workload": "panda", "in_channels": 4}, ["in_channels", "4", "takes pixels only"]),
        ({"workload": "set", "in_channels": 4}, ["in_channels", "4", "takes pixels only"]),
        ({"workload": "panda", "data": "digits"}, ["num_classes", "1", ">= 10 for digits"]),
        ({"num_classes": 5, "in_channels": 3, "data": "digits"}, ["num_classes", "5", ">= 10 for digits"]),
        ({"workload": "ddt", "data": "digits"}, ["data", "--in-channels 3"]),
        ({"workload": "set", "model_options": ("sample_size=1",)}, ["set_size", "1", ">= 2"]),
        ({"workload": "set", "experiment": "opacus"}, ["experiment", "opacus", "a unit here has 6"]),
        ({"objective": ("multiplicity=2",), "experiment": "opacus"}, ["experiment", "a unit here has 2"]),
        ({"train": "encoder_then_full(0)"}, ["train", "encoder_then_full(0)", "a number >= 1"]),
        ({"train": "everything"}, ["train", "'everything'", "bias_norm"]),
        ({"train": "head:1-5,full:7-"}, ["train", "start of phase 2", "got 7", "accepted: 6"]),
        ({"workload": "x2", "pretrained": True}, ["workload", "'x2'", "drop --pretrained"]),
        ({"workload": "ddt", "model_options": ("num_heads=[5,5]",)}, ["hidden_size", "multiple of 5"]),
    ],
)
def test_mistakes_name_field_value_and_fix(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        ExperimentConfig(**{"experiment": "ghost", **values})  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_pretrained_is_the_workload_of_diffusers() -> None:
    named, flagged = resolve(workload="diffusers", model="folder"), resolve(pretrained=True, model="folder")
    assert named == flagged
    assert (named["workload"], named["pretrained"], named["model"], named["depth"]) == (
        "diffusers",
        True,
        "folder",
        None,
    )


def test_every_workload_says_what_it_is_made_of() -> None:
    found = {name: resolve(workload=name) for name in WORKLOADS}
    assert {name: (r["model"], r["num_tokens"], r["unit"], r["rows_per_unit"]) for name, r in found.items()} == {
        "dit": ("DiT-XL/2", 256, "image", 1),
        "diffusers": ("facebook/DiT-XL-2-256", None, "image", 1),
        "x2": ("x2 DiT-XL/2", 256, "image", 1),
        "set": ("Set/2", 256, "set", 6),
        "ddt": ("DDT-XL/1", 256, "image", 1),
        "panda": ("Panda/4", 4096, "image", 1),
    }
    assert found["x2"]["trained_groups"] == ["x2", "head"]
    assert found["ddt"]["hidden_size"] == [1152, 2048]
    assert json.loads(json.dumps(found)) == found


def test_a_schedule_starts_with_its_first_phase() -> None:
    resolved = resolve(workload="set", train="encoder_then_full(5000)", objective=["multiplicity=2"])
    assert (resolved["train"], resolved["trained_groups"]) == ("encoder_then_full(5000)", ["encoder"])
    assert resolved["rows_per_unit"] == 12
    resolved = resolve(workload="ddt", train="encoder+head:1-5,full:6-")
    assert (resolved["train"], resolved["trained_groups"]) == ("encoder+head:1-5,full:6-", ["encoder", "head"])


@pytest.mark.parametrize(
    ("values", "said", "file"),
    [
        (
            {"workload": "x2", "model": "DiT-S/2", "depth": 4, "batch_size": 2},
            "ghost: x2 DiT-S/2 (depth 4), 256 px, input 4x32x32, T=256, batch 2, float32, trains x2, head",
            "ghost-x2-DiT-S-2-depth-4-256px-b2-float32-",
        ),
        (
            {"workload": "set", "train": "encoder_then_full(9)"},
            "ghost: Set/2, 32 px, input 3x32x32, T=256, batch 1 of 6 rows each, float32, trains encoder "
            "(encoder_then_full(9))",
            "ghost-Set-2-32px-b1-float32-",
        ),
        (
            {"workload": "ddt", "model": "DDT-S", "model_options": ("hidden_size=[96,144]",)},
            "ghost: DDT-S/1 (width 96/144), 224 px, input 768x16x16, T=256, batch 1, float32",
            "ghost-DDT-S-1-width-96-144-224px-b1-float32-",
        ),
    ],
)
def test_a_cell_is_named_by_its_workload(values: dict[str, object], said: str, file: str) -> None:
    config = ExperimentConfig(**{"experiment": "ghost", **values})  # type: ignore[arg-type]
    assert describe_cell(config) == said
    assert file_name(config, "cpu").startswith(file)
