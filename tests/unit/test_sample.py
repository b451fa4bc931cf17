import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image

from dit_dp.clipping import attach
from dit_dp.console import guarded
from dit_dp.data import image_folder
from dit_dp.errors import UsageError
from dit_dp.frontends import make_frontend
from dit_dp.models.dit import randomize_zero_init_
from dit_dp.sample import SampleArgs, Trained, load_for_sampling, run_sample, sample
from dit_dp.sampling import SamplingConfig, evaluating, sample_from, to_uint8
from dit_dp.training.checkpoint import CheckpointState, PrivacyFacts, base_digest, save
from dit_dp.training.phases import PhaseRunner
from dit_dp.training.step import train_step
from dit_dp.workloads import WorkloadConfig, build_model, build_objective, input_shape

SMALL: dict[str, Any] = {"image_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
PIXELS = WorkloadConfig(
    workload="dit", in_channels=3, num_classes=5, learn_sigma=False, objective=("num_steps=100",), **SMALL
)
ADAPTED = dataclasses.replace(PIXELS, train="lora(2)")
LATENTS = WorkloadConfig(workload="dit", in_channels=4, num_classes=5, **{**SMALL, "image_size": 64})
SETS = WorkloadConfig(workload="set", model_options=("sample_size=3",), objective=("num_steps=100",), **SMALL)
PANDA = WorkloadConfig(workload="panda", image_size=8, hidden_size=8, depth=1, num_heads=2)


def trained(config: WorkloadConfig) -> Trained:
    torch.manual_seed(0)
    model = randomize_zero_init_(build_model(config.spec), torch.Generator().manual_seed(1), std=0.1)
    averages = {name: p.detach() + 0.05 for name, p in model.named_parameters()}
    return Trained(spec=config.spec, model=model, averages=averages)


def run(config: WorkloadConfig, folder: Path, **options: Any) -> list[Path]:
    options = {"num_samples": 7, "batch_size": 4, "steps": 2, **options}
    return run_sample(SampleArgs(checkpoint=folder, output=folder / "out", **options), lambda _: trained(config))


def arrays(folder: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    with np.load(folder / "out" / "samples.npz") as file:
        return file["arr_0"], file["arr_1"].tolist()


def test_a_grid_an_npz_and_an_image_folder(tmp_path: Path) -> None:
    written = run(PIXELS, tmp_path, npz=True, images=True, classes=(3, 1), cfg_scale=2.0, seed=5)
    assert [path.name for path in written] == ["grid.png", "samples.npz", "images"]
    pixels, labels = arrays(tmp_path)
    assert labels == [3, 1, 3, 1, 3, 1, 3]
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.size == (3 * 10 + 2, 3 * 10 + 2)
        assert np.array_equal(np.asarray(picture)[2:10, 2:10], pixels[0])
    folder = image_folder(tmp_path / "out" / "images", size=8)
    assert folder.class_names == ("1", "3")
    first = folder.take(torch.tensor([3]))[0]  # of the class 3
    assert np.array_equal(((first + 1) * 127.5).round()[0].permute(1, 2, 0).numpy(), pixels[0])


def test_averages_guidance_and_seed_make_a_difference(tmp_path: Path) -> None:
    seen = []
    for options in ({}, {"ema": False}, {"cfg_scale": 3.0}, {"seed": 1}, {"clamp": False}, {}):
        run(PIXELS, tmp_path, npz=True, **options)
        seen.append(arrays(tmp_path)[0].tobytes())
    assert seen[0] == seen[-1]
    assert len(set(seen[:-1])) == 5


def test_averages_that_are_not_there_are_not_sampled_from(tmp_path: Path) -> None:
    without = dataclasses.replace(trained(PIXELS), averages={})
    args = SampleArgs(checkpoint=tmp_path, output=tmp_path / "out", num_samples=2, steps=2)
    with pytest.raises(UsageError, match="no averages"):
        run_sample(dataclasses.replace(args, ema=True), lambda _: without)
    written = [
        run_sample(dataclasses.replace(args, ema=ema), lambda _, which=which: which)[0].read_bytes()
        for ema, which in ((None, without), (False, trained(PIXELS)), (None, trained(PIXELS)))
    ]
    assert written[0] == written[1] != written[2]


def test_latents_are_decoded_by_their_front_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = (8, 8, 8, 8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes,
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    run(LATENTS, tmp_path, npz=True, frontend=str(tmp_path / "vae"), num_samples=2)
    spec = LATENTS.spec
    model = trained(LATENTS)
    with evaluating(model.model, model.averages):
        latents = sample_from(
            model.model,
            build_objective(spec),
            shape=input_shape(spec),
            labels=torch.arange(2),
            config=SamplingConfig.of(spec, num_steps=2),
        )
    expected = to_uint8(make_frontend("vae", tmp_path / "vae").decode(latents))
    assert np.array_equal(arrays(tmp_path)[0], expected.numpy())
    assert expected.shape == (2, 64, 64, 3)


def test_sets_are_given_images(tmp_path: Path) -> None:
    found = []
    for classes in ((0, 1), (0, 1), (7,)):
        run(SETS, tmp_path, npz=False, images=True, context="digits", classes=classes, num_samples=3)
        path = tmp_path / "out" / "images" / "0" / "000000.png"
        found.append((path.read_bytes(), (path.parent / "000001.png").read_bytes()))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PIXELS, {"classes": (5,)}, "labels from 0 to 4"),
        (PIXELS, {"steps": 101}, "at most 100"),
        (PIXELS, {"sampler": "euler"}, "ancestral, ddim"),
        (PIXELS, {"eta": 0.5}, "only sampler=ddim"),
        (PIXELS, {"context": "digits"}, "not of sets"),
        (PIXELS, {"frontend": "vae"}, "samples pixels"),
        (LATENTS, {}, "front-end"),
        (LATENTS, {"frontend": "./absent"}, "frontend"),
        (PANDA, {"cfg_scale": 2.0}, "null label"),
        (SETS, {}, "digits, mnist, an image folder"),
        (SETS, {"context": "digits", "classes": (10,)}, "labels from 0 to 9"),
        (SETS, {"context": "digits", "cfg_scale": 2.0}, "null label"),
    ],
)
def test_mistakes_are_one_line(config: WorkloadConfig, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(config, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def checkpointed(folder: Path, config: WorkloadConfig, step: int = 3) -> Trained:
    """Write a checkpoint of what `trained` returns, a step of training later, and return what it holds."""
    spec, made = config.spec, trained(config)
    runner = PhaseRunner(
        made.model,
        spec.schedule,
        attach=lambda model: attach(model, "bookkeeping", max_grad_norm=1.0),
        # one step of small adapters would not show in a picture of 8 bits
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3 if config.train is None else 1.0),
        ema_decay=0.5,
    )
    generator = torch.Generator().manual_seed(2)
    objective = build_objective(spec)
    batch = objective.draw(torch.randn(2, *input_shape(spec), generator=generator), torch.arange(2), generator)
    settings: dict[str, Any] = {"noise_multiplier": 0.0, "expected_batch_size": 2, "ema": runner.ema}
    train_step(runner.engine, runner.optimizer, objective, [batch], **settings)
    state = CheckpointState(
        step=step,
        phase=0,
        workload=spec.name,
        spec=dataclasses.asdict(spec),
        base_sha256=base_digest(runner),
        data_sha256="0" * 64,
        settings={},
        privacy=PrivacyFacts(noise_multiplier=0.0, sample_rate=0.1),
    )
    save(folder, runner, state)
    return Trained(spec=spec, model=made.model, averages=runner.averages)


@pytest.mark.parametrize("config", [PIXELS, ADAPTED], ids=["full", "lora"])
def test_a_checkpoint_is_sampled_from_as_the_model_that_wrote_it(config: WorkloadConfig, tmp_path: Path) -> None:
    if config.train is not None:
        pytest.importorskip("peft")
    checkpointed(tmp_path / "run" / "checkpoints", config, step=1)
    kept = checkpointed(tmp_path / "run" / "checkpoints", config, step=3)
    assert any(not torch.equal(p, kept.averages.get(name, p)) for name, p in kept.model.named_parameters())
    found = load_for_sampling(tmp_path / "run")
    assert found.spec == kept.spec
    assert all(torch.equal(p, dict(kept.model.named_parameters())[n]) for n, p in found.model.named_parameters())
    assert found.averages.keys() == kept.averages.keys()
    written = []
    for path in (
        tmp_path / "run",
        tmp_path / "run" / "checkpoints",
        tmp_path / "run" / "checkpoints" / "step-00000003",
    ):
        args = SampleArgs(checkpoint=path, output=tmp_path / "out", num_samples=3, steps=2)
        written.append(run_sample(args)[0].read_bytes())
    written.append(run_sample(args, lambda _: kept)[0].read_bytes())
    assert len(set(written)) == 1
    assert run_sample(dataclasses.replace(args, ema=False))[0].read_bytes() != written[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointed(tmp_path / "run" / "checkpoints", PIXELS)
    line = [
        "--checkpoint",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "out"),
        "--num_samples",
        "2",
        "--steps",
        "2",
    ]
    assert guarded(SampleArgs, line, "dit-dp sample", sample, name="dit-dp") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'grid.png'}\n"
    for wrong in (["--classes", "5"], ["--sampler", "heun"], ["--checkpoint", str(tmp_path / "absent")]):
        assert guarded(SampleArgs, [*line, *wrong], "dit-dp sample", sample, name="dit-dp") == 2
        said = capsys.readouterr()
        assert said.err.startswith("dit-dp: error: ")
        assert said.err.count("\n") == 1
        assert not said.out


def test_samples_without_an_output_are_beside_the_run_and_never_over_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointed(tmp_path / "run" / "checkpoints", PIXELS)
    checkpointed(tmp_path / "alone", PIXELS, step=4)
    written = []
    for place in ("run", "run", "run/checkpoints/step-00000003", "alone"):
        line = f"--checkpoint {tmp_path / place} --num_samples 2 --cfg_scale 2.0 --steps 2".split()
        assert guarded(SampleArgs, line, "dit-dp sample", sample, name="dit-dp") == 0
        written.append(capsys.readouterr().out.strip())
    wrong = ["--checkpoint", str(tmp_path / "run"), "--classes", "5"]
    assert guarded(SampleArgs, wrong, "dit-dp sample", sample, name="dit-dp") == 2
    folders = ["run/samples-step-00000003", "run/samples-step-00000003-2", "run/samples-step-00000003-3"]
    assert written == [str(tmp_path / folder / "grid.png") for folder in (*folders, "alone/samples-step-00000004")]
    assert {path.name for path in (tmp_path / "run").glob("samples*")} == {Path(folder).name for folder in folders}
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_checkpoints_that_are_none_are_refused(tmp_path: Path) -> None:
    checkpointed(tmp_path / "run" / "checkpoints", PIXELS)
    file = tmp_path / "run" / "checkpoints" / "step-00000003" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for name, words in [("absent", "a whole checkpoint"), ("empty", "a whole checkpoint"), ("run", "changed after")]:
        with pytest.raises(UsageError, match=words) as caught:
            run_sample(SampleArgs(checkpoint=tmp_path / name, output=tmp_path / "out"))
        assert "\n" not in str(caught.value)


def test_devices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device") as caught:
        run_sample(SampleArgs(checkpoint=tmp_path, output=tmp_path / "out", device="nonsense"))
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def load(path: Path) -> Trained:
        raise AssertionError

    with pytest.raises(UsageError, match="cannot write"):
        run_sample(SampleArgs(checkpoint=tmp_path, output=tmp_path / "file" / "out"), load)


@pytest.mark.parametrize("dash", ["-", "_"])
def test_flags_in_both_spellings(dash: str) -> None:
    line = (
        "--checkpoint runs/a --output out --num-samples 100 --cfg-scale 2.0 --steps 50 --sampler ddim --classes 0 1 2 "
        "--seed 3 --batch-size 8 --npz --guide-channels 3 --frontend vae"
    )
    words = [word if not word.startswith("--") else "--" + word[2:].replace("-", dash) for word in line.split()]
    args = tyro.cli(SampleArgs, args=words, config=(tyro.conf.OmitArgPrefixes,))
    assert args == SampleArgs(
        checkpoint=Path("runs/a"),
        output=Path("out"),
        num_samples=100,
        cfg_scale=2.0,
        steps=50,
        sampler="ddim",
        classes=(0, 1, 2),
        seed=3,
        batch_size=8,
        npz=True,
        guide_channels="3",
        frontend="vae",
    )


@pytest.mark.parametrize(
    "options",
    [{"num_samples": 0}, {"batch_size": 0}, {"seed": -1}, {"guide_channels": "4"}, {"sampler": "x"}, {"variance": "x"}],
)
def test_values_that_are_not_accepted(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SampleArgs(checkpoint=Path("a"), output=Path("b"), **options)
