"""A run: what it is asked for, what it does, what it writes; small enough for a second."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from dit_dp import train
from dit_dp.console import WORLD_VARIABLES, parse
from dit_dp.errors import UsageError
from dit_dp.privacy import Ledger, Mechanism, epsilon
from dit_dp.privacy.statement import rounded_up
from dit_dp.trainer.budget import plan_budget
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.dry import check_run
from dit_dp.trainer.interrupts import STOPS
from dit_dp.trainer.rates import learning_rate_at
from dit_dp.trainer.recipes import load_recipe, recipe_names, with_recipe
from dit_dp.trainer.run import Run, run
from dit_dp.trainer.world import join_world

TINY: dict[str, Any] = {
    "data": "digits",
    "in_channels": 3,
    "image_size": 8,
    "model": "DiT-S/2",
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
    "batch_size": 16,
    "steps": 4,
    "noise_multiplier": 1.0,
    "method": "bookkeeping",
    "num_samples": 0,
    "log_every": 1,
    "device": "cpu",
}

SETS: dict[str, Any] = {
    "workload": "set",
    "model": "Set/2",
    "num_classes": None,
    "model_options": ("sample_size=3",),
}


def tiny(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "output_dir": folder, **changes})


def only_run(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.name[:3].isdigit())
    return found


def test_a_run_writes_what_it_did(tmp_path: Path) -> None:
    run(tiny(tmp_path, held_out=0.1, num_samples=4, ema_decay=0.9))
    folder = only_run(tmp_path)
    assert folder.name == "000-DiT-S-2-train"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["num_charges"]) == (4, 4)
    charged = Mechanism(noise_multiplier=1.0, sample_rate=summary["sample_rate"], num_steps=4)
    assert summary["epsilon"] == pytest.approx(epsilon(charged, 1e-5), rel=1e-6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["validation_loss"] > 0 and line["loss"] > 0 for line in lines)
    assert [line["epsilon"] for line in lines] == sorted(line["epsilon"] for line in lines)
    log = (folder / "log.txt").read_text()
    assert "(step=0000004) Train Loss: " in log
    assert f"Epsilon: {rounded_up(summary['epsilon'])} (delta 1e-05)" in log  # the last line has no mere bound
    assert all(line["delta"] == 1e-5 and line["epsilon_charges"] >= line["num_charges"] for line in lines)
    assert [line["num_charges"] for line in lines] == [1, 2, 3, 4]
    assert "not covered by epsilon" in log
    assert "delta 1e-05" in log
    assert (folder / "samples" / "step-00000004.png").is_file()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_run_goes_through_the_phases_it_was_given(tmp_path: Path) -> None:
    run(tiny(tmp_path, train="head:1-1,head+bias_norm:2-3,full:4-4"))
    lines = [json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    modes = [line["training_mode"] for line in lines]
    assert modes == ["FROZEN_backbone (step 1/1)", *(f"PARTIAL_head+bias_norm (step {n}/3)" for n in (2, 3)), "FULL"]
    assert [line["debug/grad_norm_backbone"] > 0 for line in lines] == [False, True, True, True]
    assert (
        json.loads((only_run(tmp_path) / "config.json").read_text())["train"] == "head:1-1,head+bias_norm:2-3,full:4-4"
    )


def test_a_run_goes_on_where_it_was_and_pays_for_what_was_lost(tmp_path: Path) -> None:
    run(tiny(tmp_path, steps=3, checkpoint_every=2))
    folder = only_run(tmp_path)
    last = folder / "checkpoints" / "step-00000003"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    run(tiny(tmp_path, steps=3, checkpoint_every=2, resume="auto"))
    assert only_run(tmp_path) == folder
    assert Ledger.read(folder / "ledger.jsonl").num_charges == 4  # step 3 twice


def test_a_run_stops_before_the_step_that_would_overspend(tmp_path: Path) -> None:
    config = tiny(tmp_path, epsilon=2.2, noise_multiplier=0.8, steps=40, batch_size=64)
    run(config)
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    charged = Mechanism(noise_multiplier=0.8, sample_rate=summary["sample_rate"], num_steps=summary["steps"])
    assert 0 < summary["steps"] < 40
    assert epsilon(charged, 1e-5) <= 2.2 < epsilon(replace(charged, num_steps=charged.num_steps + 1), 1e-5)


def test_the_noise_keeps_the_budget(tmp_path: Path) -> None:
    config = tiny(tmp_path, epsilon=3.0, noise_multiplier=None, steps=50)
    budget = plan_budget(config, config.spec, 1000)
    run_of = Mechanism(noise_multiplier=budget.noise_multiplier, sample_rate=0.016, num_steps=50)
    assert 2.97 < epsilon(run_of, 1e-5) <= 3.0
    assert budget.most_charges == 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "vanilla", "noise_multiplier": None}, "no privacy: vanilla"),
        ({"noise_multiplier": 0.0}, "no privacy"),
        ({"insecure_seed": 1}, "no privacy: sampling and noise come from a seed"),
        ({"sampling": "shuffled"}, "no epsilon is claimed"),
    ],
)
def test_what_is_not_private_says_so(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = tiny(tmp_path, **changes)
    assert said in plan_budget(config, config.spec, 1000).claim


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": None}, "data: got None"),
        ({"data": "nowhere"}, "data: got 'nowhere'"),
        ({"noise_multiplier": None}, "epsilon: got None"),
        ({"epsilon": 0.0}, "epsilon: got 0.0"),
        ({"epsilon": -1.0}, "epsilon: got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: got nan"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier: got nan"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"delta": 1.0}, "delta: got 1.0"),
        ({"delta": 0.0}, "delta: got 0.0"),
        ({"epochs": 2.0}, "steps: got 4"),
        ({"steps": None}, "steps: got None"),
        ({"method": "vanilla"}, "vanilla has no privacy"),
        ({"sampling": "shuffled", "epsilon": 1.0}, "no epsilon is claimed of fixed batches"),
        ({"batch_size": 5000}, "batch_size: got 5000"),
        ({"memory_budget_gib": 1.0}, "memory_budget_gib: got 1.0"),
        ({"epsilon": 0.1, "noise_multiplier": 0.5}, "one step with noise multiplier 0.5"),
        ({"sharding": "fsdp2", "method": "lean"}, "sharding: got 'fsdp2'"),
        ({"sharding": "fsdp2", "method": "auto", "memory_budget_gib": 1.0}, "memory_budget_gib: got 1.0"),
        ({"resume": "nowhere"}, "resume: got 'nowhere'"),
        ({"num_classes": 5}, "num_classes: got 5"),
        ({"held_out": 1e-9}, "held_out: got 1e-09"),
        ({"in_channels": 4}, "image_size: got 8"),
        ({"in_channels": 4, "image_size": 64}, "frontend: got None"),
        ({"frontend": "vae", "workload": "panda", "model": "Panda/4", "num_classes": None}, "takes pixels"),
        ({"weights": Path("nowhere.pt")}, "nowhere.pt"),
        (SETS, "each class (9 of 1797 would be in no set: class 0 has 178, 1 over"),
        ({"set_remainder": "leave"}, "set_remainder: got 'leave'; accepted: refuse, drop"),
        ({"weights_are_public": True}, "weights_are_public: got True"),
        ({"train": "head:1-2,full:2-"}, "they overlap"),
        ({"train": "head:1-2,hed:3-"}, "group of DiT: got 'hed'"),
        ({"train": "head:1-2,full:3-3"}, "the last phase ends after step 3, and the run takes 4"),
        ({"train": "head:1-2,full:3-3", "steps": None, "epochs": 1.0}, "the last phase ends after step 3"),
        ({"tracker": "tensorboard", "insecure_seed": -1}, "insecure_seed: got -1"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_left(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    for dry_run in (False, True):
        with pytest.raises(UsageError) as raised:
            run(tiny(tmp_path / "runs", dry_run=dry_run, **changes))
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_sets_that_leave_images_out_are_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tiny(tmp_path, **SETS, steps=1, set_remainder="drop"))
    assert "images are in no set of 3" in caplog.text
    assert json.loads((only_run(tmp_path) / "summary.json").read_text())["num_units"] == 596


def test_auto_on_shards_is_the_one_pass_method_that_runs_there(tmp_path: Path) -> None:
    assert tiny(tmp_path, sharding="fsdp2", method="auto").method == "ghost_fsdp_bk"


@pytest.mark.parametrize(
    "words",
    [["--batch-size", "-1"], ["--batch-size", "2", "--steps", "2", "--noise-multiplier", "1", "--device", "cuda"]],
    ids=["words", "device"],
)
def test_of_a_machines_processes_one_says_what_is_wrong_with_its_words(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in WORLD_VARIABLES:
        monkeypatch.setenv(name, "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        try:
            code = train.main(["--data", "digits", *words])
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
    monkeypatch.delenv("RANK")  # not torchrun's doing
    assert train.main(["--data", "digits", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="device: got 'cuda'"):
        run(tiny(tmp_path, device="cuda"))


@pytest.mark.parametrize("name", ["noise_multiplier", "batch_size", "data"])
def test_a_run_does_not_go_on_under_other_conditions(tmp_path: Path, name: str) -> None:
    run(tiny(tmp_path))
    other = {"noise_multiplier": 2.0, "batch_size": 8, "data": "synthetic"}
    with pytest.raises(UsageError, match=r"checkpoint|ledger"):
        run(tiny(tmp_path, resume="auto", steps=6, **{name: other[name]}))
    assert Ledger.read(only_run(tmp_path) / "ledger.jsonl").num_charges == 4


def test_a_run_that_is_stopped_in_its_last_step_is_done(tmp_path: Path) -> None:
    steps = Run(tiny(tmp_path), join_world("cpu")).steps()
    while next(steps) < 4:
        pass
    signal.raise_signal(signal.SIGTERM)
    assert list(steps) == []
    assert json.loads((only_run(tmp_path) / "summary.json").read_text())["steps"] == 4


def test_another_world_is_refused_unless_asked_for(tmp_path: Path) -> None:
    run(tiny(tmp_path))
    (state,) = only_run(tmp_path).glob("checkpoints/step-00000004/state.json")
    assert json.loads(state.read_text())["state"]["world_size"] == 1
    world = join_world("cpu")
    two = replace(world, size=2)
    with pytest.raises(UsageError, match=r"^resume: world_size: 2 here, 1 in .*, or say any_world_size$"):
        Run(tiny(tmp_path, resume="auto", steps=6), two).start()
    trainer = Run(tiny(tmp_path, resume="auto", steps=6, any_world_size=True), two).start()
    assert trainer.step == 4
    trainer.close()
    with pytest.raises(UsageError, match=r"^any_world_size: got True"):
        tiny(tmp_path, any_world_size=True, sampling="shuffled")


def test_a_budget_that_lost_steps_used_up_ends_the_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, epsilon=3.0, noise_multiplier=None, steps=2, checkpoint_every=1)
    run(config)
    folder = only_run(tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    run(replace(config, resume="auto"))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["num_charges"]) == (1, 2)


@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_run_keeps_the_steps_that_were_paid_for(tmp_path: Path, number: signal.Signals) -> None:
    config, before = tiny(tmp_path), [signal.getsignal(stop) for stop in STOPS]
    steps = Run(config, join_world("cpu")).steps()
    next(steps)
    next(steps)
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        next(steps)
    assert stopped.value.args == (number,)
    assert [signal.getsignal(stop) for stop in STOPS] == before
    run(replace(config, resume="auto"))
    assert Ledger.read(only_run(tmp_path) / "ledger.jsonl").num_charges == 4  # none twice


@pytest.mark.parametrize("before", [{}, {"method": "vanilla", "noise_multiplier": None}], ids=["private", "not"])
def test_weights_of_a_run_are_not_claimed_anew(tmp_path: Path, before: dict[str, Any]) -> None:
    run(tiny(tmp_path, steps=1, ema_decay=0.9, full_checkpoints=True, **before))
    (folder,) = (only_run(tmp_path) / "checkpoints").iterdir()
    link = tmp_path / "published.safetensors"
    link.symlink_to(folder / "model.safetensors")
    for weights in (folder, folder / "model.safetensors", folder / "ema.safetensors", link):
        for changes in ({}, {"held_out": 0.1}, {"data": "synthetic"}, {"dry_run": True}):
            with pytest.raises(UsageError, match=r"^weights: got .*its own run's steps alone.*--weights-are-public$"):
                run(tiny(tmp_path / "again", weights=weights, **changes))
    assert not list((tmp_path / "again").rglob("ledger.jsonl"))
    run(tiny(tmp_path / "none", weights=folder, steps=1, noise_multiplier=0.0))  # nothing is claimed


def test_weights_that_are_said_to_be_public_are_named_beside_the_claim(tmp_path: Path) -> None:
    run(tiny(tmp_path, steps=1, full_checkpoints=True))
    (folder,) = (only_run(tmp_path) / "checkpoints").iterdir()
    said = "not covered: the weights that it started from, said to be public by --weights-are-public"
    for number, weights in enumerate((folder, folder / "model.safetensors")):
        run(tiny(tmp_path / str(number), steps=1, weights=weights, weights_are_public=True))
        summary = json.loads((only_run(tmp_path / str(number)) / "summary.json").read_text())
        assert summary["weights_are_public"]
        assert summary["claim"].endswith(said)
        assert said in (only_run(tmp_path / str(number)) / "log.txt").read_text()
    copied = tmp_path / "published.safetensors"
    shutil.copy(folder / "model.safetensors", copied)
    config = tiny(tmp_path, weights=copied)
    assert plan_budget(config, config.spec, 1000).claim.endswith("started from, taken for public")


def test_steps_from_a_seed_are_never_given_an_epsilon(tmp_path: Path) -> None:
    run(tiny(tmp_path, insecure_seed=1))
    assert Ledger.read(only_run(tmp_path) / "ledger.jsonl").spent(1e-5) == math.inf
    with pytest.raises(UsageError, match=r"noise_multiplier was 0\.0, is 1\.0"):
        run(tiny(tmp_path, resume="auto", steps=6))


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(
        **{**TINY, "learning_rate": 1.0, "warmup_steps": 4, "lr_schedule": "cosine", "final_learning_rate": 0.1}
    )
    rates = [learning_rate_at(config, step, 10) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[6] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    linear = replace(config, lr_schedule="linear")
    assert learning_rate_at(linear, 7, 10) == pytest.approx(0.55)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_runs(name: str) -> None:
    recipe = load_recipe(name, data="synthetic")
    words = ["--recipe", name, "--data-path", "synthetic", "--steps", "7", "--epochs", "None"]
    assert parse(TrainConfig, with_recipe(words)) == replace(recipe, steps=7, epochs=None)


def test_a_recipe_of_ones_own_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("workload: dit\nspeed: 3\n")
    with pytest.raises(UsageError, match="got 'speed'"):
        load_recipe(str(file))
    file.write_text("workload: dit\ndata: digits\nsteps: many\n")
    with pytest.raises(UsageError, match="steps"):
        load_recipe(str(file))
    with pytest.raises(UsageError, match="recipe: got 'mnst'"):
        load_recipe("mnst")


def test_a_command_line_mistake_has_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--data", "digits", "--steps", "3", "--output-dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("dit-dp: error: epsilon: got None")
    words = ["--data", "digits", "--steps", "3", "--noise-multiplier", "1", "--train", "head:1-5,full:4-"]
    assert train.main([*words, "--output-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dit-dp: error: train: phases: start of phase 2: got 4")


@pytest.mark.parametrize("changes", [{}, {**SETS, "set_remainder": "drop", "held_out": 0.1}], ids=["images", "sets"])
def test_a_dry_run_says_what_would_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    run(tiny(tmp_path / "runs", epsilon=8.0, noise_multiplier=None, dry_run=True, **changes))
    said = capsys.readouterr().out
    assert "noise multiplier" in said
    assert "delta 1e-05" in said
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_encodes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    run(tiny(tmp_path / "runs", in_channels=4, image_size=64, frontend=str(tmp_path / "vae"), dry_run=True))
    assert "input 4 x 8 x 8" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"vae"}


@pytest.mark.parametrize("train", ["x2", "encoder_then_full(2)"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_dry_run_is_refused_where_the_run_is(tmp_path: Path, train: str, alone: bool) -> None:
    config, said = tiny(tmp_path / "runs", train=train), []
    with pytest.raises(UsageError, match=r"^group of DiT: got ") as raised:
        run(config)
    said.append(str(raised.value))
    with pytest.raises(UsageError) as raised:
        check_run(config, config.spec, alone=alone)
    said.append(str(raised.value))
    with pytest.raises(UsageError) as raised:
        run(replace(config, dry_run=True))
    assert {*said, str(raised.value)} == {said[0]}


def test_a_tracker_is_told_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Told:
        def scalars(self, step: int, values: dict[str, Any]) -> None:
            told.append(f"scalars {step} {'debug/context_norm' in values}")

        def histogram(self, step: int, name: str, values: torch.Tensor) -> None:
            told.append(f"histogram {step}")

        def image(self, step: int, name: str, image: Any) -> None:
            told.append(f"image {step}")

        def graph(self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            model(*inputs)
            told.append("graph")

        def close(self) -> None:
            told.append("close")

    monkeypatch.setattr("dit_dp.trainer.run.check_tracker", lambda kind: None)
    monkeypatch.setattr("dit_dp.trainer.run.make_tracker", lambda *asked: Told())
    config = tiny(
        tmp_path,
        **SETS,
        set_remainder="drop",
        steps=2,
        batch_size=4,
        held_out=0.1,
        num_samples=2,
        tracker="tensorboard",
    )
    run(config)
    run(replace(config, resume="auto"))
    assert {line for line in told if line.startswith("scalars")} == {"scalars 1 True", "scalars 2 True"}
    assert told[0] == "graph"
    assert told.count("graph") == 1
    assert "histogram 2" in told
    assert "image 2" in told
    assert told[-1] == "close"


def test_a_missing_tracker_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tracker: wandb cannot be imported .*pip install 'dit-dp\[wandb\]'"):
        run(tiny(tmp_path / "runs", tracker="wandb"))
    assert not list((tmp_path / "runs").glob("0*"))
