import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_dp.errors import UsageError
from dit_dp.frontends import FRONTENDS, Frontend, LatentStatistics, VAEFrontend, make_frontend, save_statistics
from dit_dp.privacy import Mechanism
from tests.latents import RAE_CONFIG, Halving, first_token, pixels, save_rae, save_vae

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("autoencoders") / "vae")


@pytest.fixture(scope="module")
def vae(vae_folder: Path) -> Frontend:
    return make_frontend("vae", vae_folder)


@pytest.fixture(scope="module")
def rae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 2, 2, generator=generator)
    std = torch.rand(64, 2, 2, generator=generator) + 0.5
    path = tmp_path_factory.mktemp("autoencoders") / "rae"
    return save_rae(path, latents_mean=mean.tolist(), latents_std=std.tolist())


@pytest.fixture(scope="module")
def rae(rae_folder: Path) -> Frontend:
    return make_frontend("rae", rae_folder)


@pytest.fixture
def any_frontend(request: pytest.FixtureRequest) -> Frontend:
    frontend: Frontend = request.getfixturevalue(request.param)
    return frontend


each = pytest.mark.parametrize("any_frontend", sorted(FRONTENDS), indirect=True)


def refused(message: str) -> Any:
    """Expect a usage error of one line."""
    return pytest.raises(UsageError, match=rf"\A(?=[^\n]*\Z).*(?:{message})")


def test_a_vae_is_the_original_and_its_scale(vae: Frontend, vae_folder: Path) -> None:
    original = diffusers.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval().requires_grad_(False)
    x = pixels(3)
    with torch.no_grad():
        posterior = original.encode(x).latent_dist
        wanted = (posterior.mode() - 0.25) * 0.5
        drawn = (posterior.sample(torch.Generator().manual_seed(1)) - 0.25) * 0.5
        images = original.decode(wanted / 0.5 + 0.25).sample
    latents = vae.encode(x)
    assert (latents.shape, latents.dtype) == ((3, 4, 4, 4), torch.float32)
    assert torch.equal(latents, wanted)
    assert torch.equal(vae.encode(x), latents)
    assert torch.equal(vae.encode(x, torch.Generator().manual_seed(1)), drawn)
    assert not torch.equal(drawn, wanted)
    assert torch.equal(vae.decode(latents), images)
    assert vae.settings() == {"posterior": "mean", "scaling_factor": "0.5", "shift_factor": "0.25"}


def test_a_vae_is_found_in_a_pipeline_and_without_a_shift(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", shift_factor=None)
    folders = [make_frontend("vae", tmp_path), make_frontend("vae", tmp_path / "vae")]
    folders.append(make_frontend("vae", tmp_path, subfolder="vae"))
    latents = [frontend.encode(pixels(2)) for frontend in folders]
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
    original = (
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    )
    with torch.no_grad():
        assert torch.equal(latents[0], original.encode(pixels(2)).latent_dist.mode() * 0.5)


def resized(x: Tensor) -> Tensor:
    """Return images as the encoder of the representation autoencoder is given them."""
    mean, std = (torch.tensor(IMAGENET[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (F.interpolate((x + 1) / 2, (28, 28), mode="bicubic", align_corners=False) - mean) / std


def features(folder: Path, x: Tensor) -> Tensor:
    """Return the last features of transformers' encoder with a checkpoint's weights, (N, 64, 2, 2)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=14, image_size=518
    )
    encoder = transformers.Dinov2WithRegistersModel(config).eval()
    weights = {
        k.removeprefix("encoder."): v for k, v in load_file(folder / WEIGHTS).items() if k.startswith("encoder.")
    }
    left = encoder.load_state_dict(weights, strict=False)
    assert sorted(left.missing_keys) == ["layernorm.bias", "layernorm.weight"]
    assert not left.unexpected_keys
    with torch.no_grad():
        tokens = encoder(resized(x)).last_hidden_state[:, 1 + config.num_register_tokens :]
    assert torch.allclose(tokens.mean(-1), torch.zeros(len(x), 4), rtol=0, atol=1e-5)  # a layer norm without weights
    return tokens.transpose(1, 2).reshape(len(x), 64, 2, 2)


def test_a_rae_encodes_as_dinov2_does(rae: Frontend, rae_folder: Path) -> None:
    x = pixels(3, size=12)
    config = json.loads((rae_folder / "config.json").read_text())
    mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    wanted = (features(rae_folder, x) - mean) / (std + 1e-5)
    latents = rae.encode(x)
    assert (latents.shape, latents.dtype) == ((3, 64, 2, 2), torch.float32)
    assert torch.allclose(latents, wanted, rtol=0, atol=1e-5)
    assert (wanted - features(rae_folder, x)).abs().max() > 0.5
    assert rae.settings() == {"input_size": "28", "scaling_factor": "1.0", "statistics": "checkpoint"}


def test_a_rae_takes_weights_by_their_older_names(rae: Frontend, rae_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(rae_folder, tmp_path / "older"))
    weights = load_file(copy / WEIGHTS)
    older = {}
    for name, value in weights.items():
        if name.startswith("encoder."):
            for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                name = name.replace(f"attention.{new}.", f"attention.attention.{old}.")
            name = name.replace("attention.o_proj.", "attention.output.dense.")
        older[name] = value
    assert len(set(older) - set(weights)) == 2 * 4 * 2  # weights and biases of four linears, in two layers
    save_file(older, copy / WEIGHTS, metadata={"format": "pt"})
    assert make_frontend("rae", copy).weights == rae.weights


def test_a_rae_decodes_as_a_vit_mae_does(rae: Frontend, rae_folder: Path) -> None:
    latents = torch.randn(3, 64, 2, 2, generator=torch.Generator().manual_seed(3))
    config = json.loads((rae_folder / "config.json").read_text())
    mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    tokens = (latents * (std + 1e-5) + mean).flatten(2).transpose(1, 2)
    decoder = vit_mae_decoder(rae_folder)
    with torch.no_grad():
        order = torch.arange(4).expand(3, -1)
        logits = decoder(torch.cat([first_token().expand(3, -1, -1), tokens], dim=1), order).logits  # (N, 4, 4 4 3)
    patches = logits.view(3, 2, 2, 4, 4, 3)
    images = patches.permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 8, 8)
    wanted = images * torch.tensor(IMAGENET["std"]).view(1, 3, 1, 1) + torch.tensor(IMAGENET["mean"]).view(1, 3, 1, 1)
    assert torch.allclose(rae.decode(latents), wanted * 2 - 1, rtol=0, atol=1e-5)


def test_a_rae_normalises_by_the_statistics_of_a_file(rae_folder: Path, tmp_path: Path) -> None:
    x = pixels(2)
    plain = features(rae_folder, x)
    none = make_frontend("rae", rae_folder, statistics="none")
    assert torch.allclose(none.encode(x), plain, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    for shape in ((64,), (64, 1, 1), (64, 2, 2)):
        mean, var = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        save_statistics(LatentStatistics(mean=mean, var=var), tmp_path / "statistics.safetensors")
        frontend = make_frontend("rae", rae_folder, statistics=tmp_path / "statistics.safetensors")
        wide = [t.view(-1, 1, 1) if t.ndim == 1 else t for t in (mean, var)]
        wanted = (plain - wide[0]) / (wide[1] + 1e-5).sqrt()
        assert torch.allclose(frontend.encode(x), wanted, rtol=1e-4, atol=1e-4)
        back = none.decode(frontend.encode(x) * (wide[1] + 1e-5).sqrt() + wide[0])
        assert torch.allclose(frontend.decode(frontend.encode(x)), back, rtol=1e-4, atol=1e-4)
        assert frontend.settings()["statistics"] not in ("none", "checkpoint")
        assert frontend.weights != none.weights
        assert frontend.spent is None
    save_statistics(LatentStatistics(mean=mean, var=var, noise_multiplier=3.0), tmp_path / "statistics.safetensors")
    charged = make_frontend("rae", rae_folder, statistics=tmp_path / "statistics.safetensors")
    assert charged.spent == Mechanism(noise_multiplier=3.0, sample_rate=1.0, num_steps=1)


def test_statistics_have_to_be_there_and_to_fit(rae_folder: Path, vae_folder: Path, tmp_path: Path) -> None:
    without = save_rae(tmp_path / "without")
    with refused(r"^statistics: got None; accepted: a safetensors file .* public data, or 'none' \(.*without holds"):
        make_frontend("rae", without)
    save_file({"mean": torch.zeros(64)}, tmp_path / "half.safetensors")
    save_file({"mean": torch.zeros(5), "var": torch.ones(5)}, tmp_path / "five.safetensors")
    save_file({"mean": torch.zeros(64), "var": -torch.ones(64)}, tmp_path / "negative.safetensors")
    (tmp_path / "text").write_text("mean")
    for name, message in {
        "half.safetensors": r"^statistics: got \['mean'\]; accepted: a file with mean and var",
        "five.safetensors": r"^statistics: got \(5,\); accepted: mean and var of \(64,\) or \(64, 2, 2\)",
        "negative.safetensors": r"^statistics: mean or var .* a variance is negative",
        "text": r"^statistics: cannot read .*text: ",
        "nowhere": r"^statistics: cannot read .*nowhere: No such file",
    }.items():
        with refused(message):
            make_frontend("rae", rae_folder, statistics=tmp_path / name)
    with refused(r"^statistics: got 'none'; accepted: None; a VAE's latents are scaled, not normalised"):
        make_frontend("vae", vae_folder, statistics="none")


def test_positions_are_diffusers_own_at_the_published_grid(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    frontend = make_frontend("rae", save_rae(tmp_path, encoder_input_size=224), statistics="none")
    original = diffusers.AutoencoderRAE.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    ours, theirs = frontend.module.decoder.decoder_pos_embed, original.decoder.decoder_pos_embed
    assert ours.shape == (1, 257, 16)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@each
def test_a_front_end_is_frozen_and_no_part_of_a_model(any_frontend: Frontend) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frontend, self.linear = any_frontend, nn.Linear(2, 2)

    model = Model().train()
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    assert not any(parameter.requires_grad for parameter in any_frontend.module.parameters())
    assert not any(module.training for module in any_frontend.module.modules())
    before = any_frontend.weights
    x = pixels(2).requires_grad_()
    latents = any_frontend.encode(x)
    assert not latents.requires_grad
    assert not any_frontend.decode(latents.requires_grad_()).requires_grad
    assert any_frontend.to("cpu").weights == before


@each
def test_an_image_has_no_share_in_anothers_latents(any_frontend: Frontend) -> None:
    x = pixels(4)
    together = any_frontend.encode(x)
    alone = torch.cat([any_frontend.encode(x[row : row + 1]) for row in range(4)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)
    assert any_frontend.encode(x[:0]).shape == (0, *together.shape[1:])
    decoded = any_frontend.decode(together)
    assert decoded.shape == x.shape
    assert any_frontend.decode(together[:0]).shape == (0, *x.shape[1:])


@each
def test_latents_are_no_pixels_and_the_reverse(any_frontend: Frontend) -> None:
    channels = any_frontend.latent_channels
    with refused(rf"^images: got \(2, {channels}, 8, 8\); accepted: square images \(N, 3, H, H\).*look like latents"):
        any_frontend.encode(torch.zeros(2, channels, 8, 8))
    for x in (torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 6)):
        with refused(r"^images: got .*accepted: square images \(N, 3, H, H\)"):
            any_frontend.encode(x)
    for value in (255.0, 3.0, float("nan")):
        with refused(r"^images: got 'a value of size .*accepted: numbers from -1 to 1; .*not latents or 0 to 255"):
            any_frontend.encode(torch.full((2, 3, 8, 8), value))
    for z in (torch.zeros(2, 3, 2, 2), torch.zeros(channels, 2, 2), torch.zeros(2, channels, 2, 4)):
        with refused(rf"^latents: got .*accepted: square latents \(N, {channels}, h, h\)"):
            any_frontend.decode(z)


def test_sizes_that_do_not_fit_are_refused(vae: Frontend, rae: Frontend) -> None:
    assert (vae.latent_size(256), vae.image_size(128)) == (128, 256)
    with refused(r"^image_size: got 7; accepted: a multiple of 2; a latent position covers 2 pixels"):
        vae.encode(pixels(1, size=7))
    assert (rae.latent_size(999), rae.image_size(2)) == (2, 8)
    with refused(r"^latent_size: got 3; accepted: 2; what the encoder makes"):
        rae.decode(torch.zeros(1, 64, 3, 3))
    with refused(r"^generator: got 'a generator'; accepted: None; a RAE has no posterior"):
        rae.encode(pixels(1), torch.Generator())
    for frontend in (vae, rae):
        with refused(r"^image_size: got 0; accepted: an integer >= 1"):
            frontend.latent_size(0)


@pytest.mark.parametrize("name", sorted(FRONTENDS))
@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere/model", "nonsense"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name: str, source: str) -> None:
    if name == "rae":
        pytest.importorskip("transformers")
    with refused(rf"^frontend: got '{source}'; accepted: an existing folder, or a hub name \(owner/name\)$"):
        make_frontend(name, source)


# huggingface_hub 2 warns about an argument that diffusers 0.42 still passes.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
def test_an_unreachable_hub_is_an_error_and_not_another_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with refused(r"^frontend: cannot load 'nobody/nothing': .*accepted: an existing folder, or a hub name that can be"):
        make_frontend("vae", "nobody/nothing")


def test_checkpoints_that_are_not_complete_are_refused(vae_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(vae_folder, tmp_path / "copy"))
    weights = load_file(copy / WEIGHTS)
    removed = {name: value for name, value in weights.items() if name != "encoder.conv_in.weight"}
    save_file(removed, copy / WEIGHTS, metadata={"format": "pt"})
    with refused(r"^frontend: .*copy' does not fit a AutoencoderKL: missing keys \['encoder.conv_in.weight'\]"):
        make_frontend("vae", copy)
    save_file({**weights, "more": torch.zeros(1)}, copy / WEIGHTS, metadata={"format": "pt"})
    with refused(r"^frontend: .*unexpected keys \['more'\]"):
        make_frontend("vae", copy)
    (copy / WEIGHTS).write_bytes(b"x")
    with refused(r"^frontend: cannot load .*copy'"):
        make_frontend("vae", copy)
    (copy / WEIGHTS).unlink()
    with refused(r"^frontend: cannot load .*copy'.*no file named"):
        make_frontend("vae", copy)
    (copy / "config.json").unlink()
    with refused(r"^frontend: got .*copy'; accepted: a folder with config\.json or vae/config\.json$"):
        make_frontend("vae", copy)
    with refused(r"^frontend: got .*; accepted: a folder with vae/config\.json$"):
        make_frontend("vae", vae_folder, subfolder="vae")


def test_other_models_and_names_are_refused(vae_folder: Path, rae_folder: Path, tmp_path: Path) -> None:
    with refused(r"^frontend: got 'vea'; accepted: vae, rae$"):
        make_frontend("vea", vae_folder)
    with refused(r"^frontend: .*rae' holds a AutoencoderRAE; accepted: a AutoencoderKL$"):
        make_frontend("vae", rae_folder)
    with refused(r"^frontend: .*vae' holds a AutoencoderKL; accepted: a AutoencoderRAE$"):
        make_frontend("rae", vae_folder)
    with refused(r"normalises by latents_mean; accepted: scaling_factor alone$"):
        make_frontend("vae", save_vae(tmp_path / "normalised", latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    mae = save_rae(tmp_path / "mae", encoder_type="mae")
    with refused(r"^encoder_type: got 'mae'; accepted: dinov2"):
        make_frontend("rae", mae)


def test_absent_libraries_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, vae_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused(r"^frontend: diffusers cannot be imported .*pip install diffusers$"):
        VAEFrontend(vae_folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(r"^rae: transformers cannot be imported .*pip install 'dit-dp\[rae\]'$"):
        make_frontend("rae", tmp_path)


def test_weights_tell_front_ends_apart(vae: Frontend, tmp_path: Path) -> None:
    assert make_frontend("vae", save_vae(tmp_path / "same")).weights == vae.weights
    assert make_frontend("vae", save_vae(tmp_path / "other", seed=1)).weights != vae.weights
    assert len(Halving().weights) == 64


def vit_mae_decoder(folder: Path) -> nn.Module:
    """Return transformers' ViT-MAE decoder with the weights of a checkpoint."""
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    config = transformers.ViTMAEConfig(
        hidden_size=64,
        patch_size=RAE_CONFIG["patch_size"],
        image_size=8,
        attn_implementation="eager",
        **{name: value for name, value in RAE_CONFIG.items() if name.startswith("decoder_")},
    )
    decoder: nn.Module = module.ViTMAEDecoder(config, num_patches=4).eval()
    names = {
        "attention.to_q": "attention.q_proj",
        "attention.to_k": "attention.k_proj",
        "attention.to_v": "attention.v_proj",
        "attention.to_out.0": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    weights = {}
    for name, value in load_file(folder / WEIGHTS).items():
        if name.startswith("decoder.") and "cls_token" not in name:
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            weights[name.removeprefix("decoder.")] = value
    left = decoder.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert sorted(left.missing_keys) == ["decoder_pos_embed", "mask_token"]  # fixed; of what is masked
    return decoder
