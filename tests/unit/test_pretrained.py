import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_dp.errors import UsageError
from dit_dp.models.dit import DiT, randomize_zero_init_
from dit_dp.models.pretrained import DiTHuggingFaceWrapper
from dit_dp.models.weights import reference_to_diffusers
from dit_dp.objectives import Objective
from dit_dp.sampling import SamplingConfig, evaluating, sample_from
from dit_dp.workloads import WorkloadConfig
from tests.models import DIFFUSERS

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = {"depth": 2, "hidden_size": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, saved by diffusers itself."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    diffusers.DiTTransformer2DModel(**DIFFUSERS).save_pretrained(path)
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the checkpoint with changed weights or configuration."""

    def make(weights: Callable[[dict[str, Tensor]], None] | None = None, **config: Any) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "broken"))
        if weights is not None:
            tensors = load_file(copy / WEIGHTS)
            weights(tensors)
            save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        if config:
            old = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**old, **config}))
        return copy

    return make


def load(name: Path | str, **overrides: Any) -> DiTHuggingFaceWrapper:
    arguments = {"img_size": 64, "patch_size": 2, "in_channels": 4, "num_classes": 10, "pretrained": True}
    return DiTHuggingFaceWrapper(str(name), **{**arguments, **overrides})


def custom(**overrides: Any) -> DiTHuggingFaceWrapper:
    torch.manual_seed(0)
    model = load("facebook/DiT-XL-2-256", **{"pretrained": False, **SIZES, **overrides})
    randomize_zero_init_(model, torch.Generator().manual_seed(0), std=0.1)
    return model


def reference() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, num_classes=10, **SIZES)
    randomize_zero_init_(model, torch.Generator().manual_seed(0), std=0.1)
    return model.double().eval()


def make_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.tensor([1, 2, 9])
    return x, torch.tensor([0, 500, 999]), y, noise, torch.tensor([True, False, False])


def assert_one_line(caught: pytest.ExceptionInfo[UsageError]) -> None:
    assert "\n" not in str(caught.value)


# --- the custom model ---


def test_custom_model_is_the_named_architecture() -> None:
    with torch.device("meta"):
        model = DiTHuggingFaceWrapper(
            model_name="facebook/DiT-XL-2-256",
            img_size=256,
            patch_size=2,
            in_channels=4,
            num_classes=1000,
            pretrained=False,
        )
    assert isinstance(model.model, DiT)
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert (model.latent_size, model.num_tokens, model.in_channels, model.out_channels) == (32, 256, 4, 8)
    assert model.learn_sigma
    assert model.num_classes == 1000


def test_image_size_is_pixels_and_channels_say_what_the_model_sees() -> None:
    with torch.device("meta"):
        pixels = DiTHuggingFaceWrapper("DiT-S/4", img_size=256, in_channels=3, depth=1)
        raw = DiTHuggingFaceWrapper("DiT-S/2", img_size=64, latent_downsample=1, depth=1, learn_sigma=False)
    assert (pixels.latent_size, pixels.patch_size, pixels.num_tokens) == (256, 4, 4096)
    assert (raw.latent_size, raw.out_channels, raw.learn_sigma) == (64, 4, False)


def test_custom_forward_is_the_inner_model() -> None:
    model, (x, t, y, _, drop) = custom(), make_batch()
    assert torch.equal(model(x, t, y, drop_labels=drop), model.model(x, t, y, drop))


def test_a_custom_model_needs_no_diffusers() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from dit_dp.models import DiTHuggingFaceWrapper\n"
        "DiTHuggingFaceWrapper('DiT-S/8', img_size=64, depth=1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "microsoft/dit-large"}, "model: got 'microsoft/dit-large'.*facebook/DiT-XL-2-256"),
        ({"img_size": 250}, "img_size: got 250; accepted: a multiple of 8"),
        ({"img_size": 0}, "img_size: got 0"),
        ({"in_channels": 5}, "in_channels: got 5; accepted: 3"),
        ({"img_size": 72, "patch_size": 2}, "input_size: got 9; accepted: a multiple of 2"),
        ({"class_dropout_prob": 2}, "class_dropout_prob: got 2"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        DiTHuggingFaceWrapper(**{"depth": 1, **arguments})
    assert_one_line(caught)


# --- either model ---


@pytest.fixture(params=["custom", "diffusers"])
def model(request: pytest.FixtureRequest, folder: Path) -> DiTHuggingFaceWrapper:
    return custom(class_dropout_prob=0.5) if request.param == "custom" else load(folder, class_dropout_prob=0.5)


def test_loss_is_per_example_over_the_noise_channels(model: DiTHuggingFaceWrapper) -> None:
    x, t, y, noise, drop = make_batch()
    output = model(x, t, y, target_noise=noise, drop_labels=drop)
    prediction = model(x, t, y, drop_labels=drop)
    assert output.keys() == {"loss", "logits"}
    assert torch.equal(output["logits"], prediction)
    assert prediction.shape == (3, 8, 8, 8)
    expected = torch.stack([((prediction[i, :4] - noise[i]) ** 2).mean() for i in range(3)])
    torch.testing.assert_close(output["loss"], expected)
    with pytest.raises(UsageError, match=r"target_noise: got \(2, 4, 8, 8\)"):
        model(x, t, y, target_noise=noise[:2])


def test_labels_are_drawn_once_per_example(model: DiTHuggingFaceWrapper) -> None:
    x, t, y, _, _ = make_batch()
    torch.manual_seed(7)
    drawn = torch.rand(3) < 0.5
    after = torch.rand(1)
    assert drawn.any()
    assert not drawn.all()
    torch.manual_seed(7)
    output = model(x, t, y)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(output, model(x, t, y, drop_labels=drawn))


def test_a_given_mask_and_evaluation_draw_nothing(model: DiTHuggingFaceWrapper) -> None:
    x, t, y, _, drop = make_batch()
    state = torch.get_rng_state()
    trained = model(x, t, y, drop_labels=drop)
    evaluated = model.eval()(x, t, y, drop_labels=drop)
    assert torch.equal(trained, evaluated)
    assert torch.equal(evaluated, model(x, t, torch.where(drop, 10, y)))
    assert not torch.equal(evaluated, model(x, t, y))
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_shapes_are_named(model: DiTHuggingFaceWrapper) -> None:
    x, t, y, _, _ = make_batch()
    with pytest.raises(UsageError, match=r"x: got \(3, 4, 4, 8\)"):
        model(x[:, :, :4], t, y)


def test_it_is_sampled_from_as_other_models(model: DiTHuggingFaceWrapper) -> None:
    spec = WorkloadConfig(workload="dit", in_channels=4, learn_sigma=model.learn_sigma).spec
    labels = torch.arange(3)
    with evaluating(model):
        found = [
            sample_from(
                model,
                Objective(spec.objective),
                shape=(4, model.latent_size, model.latent_size),
                labels=labels,
                config=SamplingConfig(num_steps=2, cfg_scale=scale),
            )
            for scale in (1.0, 3.0)
        ]
    assert found[0].isfinite().all()
    assert found[0].shape == (3, 4, model.latent_size, model.latent_size)
    assert not torch.allclose(found[0], found[1])


def test_opacus_validator_accepts(model: DiTHuggingFaceWrapper) -> None:
    validators = pytest.importorskip("opacus.validators")
    assert validators.ModuleValidator.validate(model, strict=False) == []


# Opacus hooks the first layers too, whose inputs need no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_per_example_gradients_match_a_loop(model: DiTHuggingFaceWrapper) -> None:
    """In diffusers' model block 0's embedder runs twice; its gradient is the sum of both."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model.double()
    x, t, y, noise, drop = make_batch(torch.float64)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    trainable = [p for p in model.parameters() if p.requires_grad]
    loop = []
    for i in range(3):
        one = slice(i, i + 1)
        loss = model(x[one], t[one], y[one], noise[one], drop[one])["loss"].sum()
        loop.append(torch.autograd.grad(loss, trainable))
    hooked = grad_sample.GradSampleModule(model, loss_reduction="sum")
    hooked(x, t, y, noise, drop)["loss"].sum().backward()
    for name, parameter, *rows in zip(names, trainable, *loop, strict=True):
        torch.testing.assert_close(
            parameter.grad_sample,
            torch.stack(rows),
            rtol=1e-10,
            atol=1e-14,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    x, t, y, noise, drop = make_batch()
    gradients = []
    for recompute in (False, True):
        model = load(folder, activation_checkpointing=recompute)
        model(x, t, y, noise, drop)["loss"].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- diffusers' model ---


def test_loads_every_weight_and_freezes_none(folder: Path) -> None:
    model = load(folder)
    saved = load_file(folder / WEIGHTS)
    loaded = model.model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert model.model.training
    assert (model.latent_size, model.patch_size, model.in_channels, model.out_channels) == (8, 2, 4, 8)
    assert model.learn_sigma


def test_every_blocks_embedder_is_its_own(folder: Path) -> None:
    x, t, y, noise, drop = make_batch()
    model = load(folder)
    model(x, t, y, noise, drop)["loss"].sum().backward()
    tables = [p.grad for name, p in model.named_parameters() if name.endswith("embedding_table.weight")]
    assert len(tables) == 2
    assert all(table is not None and table.any() for table in tables)
    assert not torch.equal(tables[0], tables[1])


def test_a_pipeline_folder_works_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "transformer")
    x, t, y, _, drop = make_batch()
    assert torch.equal(load(tmp_path)(x, t, y, drop_labels=drop), load(folder)(x, t, y, drop_labels=drop))


def test_reference_numerics_make_it_the_reference(tmp_path: Path) -> None:
    ours = reference().float()
    theirs = diffusers.DiTTransformer2DModel(**DIFFUSERS)
    theirs.load_state_dict(reference_to_diffusers(ours.state_dict()))
    theirs.save_pretrained(tmp_path)
    x, t, y, _, drop = make_batch(torch.float64)
    expected = ours.double()(x, t, y, drop)
    model = load(tmp_path, reference_numerics=True).double()
    torch.testing.assert_close(model(x, t, y, drop_labels=drop), expected, rtol=0, atol=1e-13)


def test_the_fix_for_pixels_is_named() -> None:
    with pytest.raises(UsageError, match="set pretrained=False, or use 4-channel latents"):
        load("facebook/DiT-XL-2-256", in_channels=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 128}, "img_size: got 128; accepted: 64, .*sample_size 8, not 16"),
        ({"patch_size": 4}, "patch_size: got 4; accepted: 2"),
        ({"num_classes": 1000}, "num_classes: got 1000; accepted: 10"),
        ({"depth": 28}, "depth: got 28; accepted: 2"),
        ({"hidden_size": 32}, "hidden_size: got 32; accepted: 16"),
        ({"num_heads": 4}, "num_heads: got 4; accepted: 2"),
        ({"learn_sigma": False}, "out_channels: got 4; accepted: 8"),
    ],
)
def test_contradictions_name_both_values(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(folder, **arguments)
    assert_one_line(caught)


def test_a_missing_or_left_over_weight_is_never_made_up(broken: Callable[..., Path]) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["other.weight"] = tensors.pop("proj_out_1.weight")

    path = broken(swap)
    with pytest.raises(UsageError, match=r"missing keys \['proj_out_1.weight'\].*unexpected keys") as caught:
        load(path)
    assert_one_line(caught)


def test_a_weight_of_the_wrong_shape_is_named(broken: Callable[..., Path]) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["proj_out_1.weight"] = tensors["proj_out_1.weight"][:3].clone()

    path = broken(cut)
    with pytest.raises(UsageError, match=r"cannot load .*proj_out_1\.weight") as caught:
        load(path)
    assert_one_line(caught)


def test_an_older_checkpoint_with_the_general_class_name_loads(broken: Callable[..., Path], folder: Path) -> None:
    """The published checkpoints were saved when one class served every 2-D transformer."""
    path = broken(_class_name="Transformer2DModel", cross_attention_dim=None, use_linear_projection=False)
    x, t, y, _, drop = make_batch()
    assert torch.equal(load(path)(x, t, y, drop_labels=drop), load(folder)(x, t, y, drop_labels=drop))


def test_another_kind_of_model_is_refused(broken: Callable[..., Path]) -> None:
    path = broken(_class_name="AutoencoderKL")
    with pytest.raises(UsageError, match="holds a AutoencoderKL; accepted: a DiTTransformer2DModel"):
        load(path)


def test_damaged_or_absent_files_are_named(broken: Callable[..., Path], tmp_path: Path) -> None:
    path = broken()
    (path / WEIGHTS).write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match=r"cannot load .*Unable to load weights") as caught:
        load(path)
    assert_one_line(caught)
    (path / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"cannot load .*no file named"):
        load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot load .*not a valid JSON file"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"a folder with config\.json or transformer/config\.json"):
        load(path)


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-S", "/nowhere/at/all", "./nowhere/model", "nonsense"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"with pretrained=True a hub name .* or an existing folder") as caught:
        load(name)
    assert_one_line(caught)


# huggingface_hub 2 warns about an argument that diffusers 0.42 still passes.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
def test_an_unreachable_hub_is_an_error_with_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot load 'nobody/nothing': .*offline mode is enabled") as caught:
        load("nobody/nothing")
    assert_one_line(caught)


def test_absent_diffusers_says_what_to_install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="pip install diffusers") as caught:
        load(folder)
    assert_one_line(caught)
