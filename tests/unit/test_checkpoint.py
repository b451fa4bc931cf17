import ast
import errno
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from dit_dp.errors import CheckpointError, EngineStateError, UsageError
from dit_dp.objectives import ObjectiveConfig
from dit_dp.training import checkpoint_files
from dit_dp.training.checkpoint import (
    CheckpointState,
    PrivacyFacts,
    base_digest,
    check_folder,
    latest,
    load,
    load_trained,
    restore,
    save,
    trained_weights,
)
from tests import workload_models
from tests.checkpoints import ALL_HEAD_ALL, OPTIMIZERS, Run, assert_same

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable_only", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_run_that_went_on(optimizer: str, trainable_only: bool, tmp_path: Path) -> None:
    run = Run(optimizer=optimizer)
    run.train(1, 2)
    path = save(tmp_path / "new" / "checkpoints", run.runner, run.state(2), trainable_only=trainable_only)
    assert path.name == "step-00000002"
    saved = run.everything()
    run.train(3, 4)
    again = Run(optimizer=optimizer, step=2)
    checkpoint = load(path)
    restore(checkpoint, again.runner, again.state(0))
    assert_same(again.everything(), saved)
    again.train(3, 4)
    assert_same(again.everything(), run.everything())
    stored = set(dict(again.model.named_parameters()))
    assert set(checkpoint.model) == (set(run.runner.engine.parameters) if trainable_only else stored)


@pytest.mark.parametrize(
    ("name", "schedule", "at", "trainable_only"),
    [
        ("set film", "encoder_then_full(2)", 1, True),
        ("set film", "encoder_then_full(2)", 2, False),
        ("set film", "encoder_then_full(2)", 3, True),
        *(("dit", ALL_HEAD_ALL, at, at % 2 == 0) for at in (2, 3, 4, 5)),
    ],
)
def test_a_run_resumes_before_at_and_after_borders(
    name: str, schedule: object, at: int, trainable_only: bool, tmp_path: Path
) -> None:
    run = Run(name, schedule)  # type: ignore[arg-type]
    run.train(1, at)
    path = save(tmp_path, run.runner, run.state(at), trainable_only=trainable_only)
    run.train(at + 1, 6)
    again = Run(name, schedule, step=at)  # type: ignore[arg-type]
    restore(load(path), again.runner, again.state(0))
    again.train(at + 1, 6)
    assert_same(again.everything(), run.everything())


@pytest.mark.parametrize("at", [2, 3])
def test_masters_of_half_precision_come_back_unrounded(at: int, tmp_path: Path) -> None:
    run = Run(schedule=ALL_HEAD_ALL, dtype=torch.bfloat16)
    run.train(1, at)
    checkpoint = load(save(tmp_path, run.runner, run.state(at)))
    masters = {name: checkpoint.model[name] for name in run.runner.engine.parameters}
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values())
    run.train(at + 1, 5)
    again = Run(schedule=ALL_HEAD_ALL, dtype=torch.bfloat16, step=at)
    restore(checkpoint, again.runner, again.state(0))
    again.train(at + 1, 5)
    assert_same(again.everything(), run.everything())


def test_adapters_are_kept_alone_and_belong_to_their_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = Run(schedule="lora(2)")
    run.train(1, 2)
    checkpoint = load(save(tmp_path, run.runner, run.state(2), trainable_only=True))
    assert all(".lora_" in name for name in checkpoint.model)
    again = Run(schedule="lora(2)", step=2)
    restore(checkpoint, again.runner, again.state(0))
    assert_same(again.everything(), run.everything())
    with pytest.raises(CheckpointError, match=r"8 unexpected .*give the model its adapters first"):
        load_trained(Run(schedule="full").model, checkpoint)


def test_a_run_without_averages_or_steps(tmp_path: Path) -> None:
    run = Run(ema_decay=None)
    path = save(tmp_path, run.runner, run.state(0))
    assert names(path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    again = Run(ema_decay=None)
    checkpoint = load(path)
    restore(checkpoint, again.runner, again.state(0))
    assert_same(again.everything(), run.everything())
    with pytest.raises(UsageError, match=r"^averaged: got True; accepted: False; .* has no averages$"):
        trained_weights(checkpoint)
    other = Run()
    with pytest.raises(UsageError, match=r"^resume: ema_decay: .* has no averages, and this run is set otherwise$"):
        restore(checkpoint, other.runner, other.state(0))


def test_trained_weights_go_over_the_base_they_were_trained_on(tmp_path: Path) -> None:
    run = Run("x2", "x2")
    run.train(1, 2)
    checkpoint = load(save(tmp_path, run.runner, run.state(2), trainable_only=True))
    assert not any(name.startswith("blocks.") for name in checkpoint.model)
    for averaged in (True, False):
        fresh = Run("x2", "x2").model
        load_trained(fresh, checkpoint, averaged=averaged)
        wanted = dict(run.model.named_parameters()) | (run.runner.averages if averaged else {})
        assert all(torch.equal(p, wanted[name]) for name, p in fresh.named_parameters())
    with torch.no_grad():
        fresh.blocks[0].mlp.fc1.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"was trained on other base weights than the model has"):
        load_trained(fresh, checkpoint)
    whole = load(save(tmp_path / "whole", run.runner, run.state(2)))
    load_trained(fresh, whole, averaged=False)
    assert all(torch.equal(p, dict(run.model.named_parameters())[name]) for name, p in fresh.named_parameters())


def test_the_base_digest_sees_names_and_contents_of_what_never_trains() -> None:
    run = Run("x2", "x2")
    before = base_digest(run.runner)
    run.train(1, 2)
    assert base_digest(run.runner) == before == base_digest(Run("x2", "x2").runner)
    with torch.no_grad():
        run.model.blocks[0].mlp.fc1.weight[0, 0] += 1e-6
    assert base_digest(run.runner) != before


# --- crashes --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends."""


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> Iterator[list[str]]:
    """Have one of the calls by which something reaches the disk fail; yields the calls made."""
    made: list[str] = []
    with monkeypatch.context() as patch:
        for owner, name in (
            *((os, name) for name in ("fsync", "replace", "mkdir")),
            (checkpoint_files, "save_file"),
            (Path, "write_text"),
        ):
            original = getattr(owner, name)

            def wrapped(*args: object, _name: str = name, _original: object = original, **options: object) -> object:
                made.append(_name)
                if len(made) == call:
                    raise error
                return _original(*args, **options)  # type: ignore[operator]

            patch.setattr(owner, name, wrapped)
        yield made


def test_a_full_disk_at_any_write_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run()
    run.train(1, 1)
    before = save(tmp_path, run.runner, run.state(1))
    run.train(2, 2)
    path, messages = tmp_path / "step-00000002", []
    for call in range(1, 100):
        with failing(monkeypatch, call, OSError(errno.ENOSPC, "No space left on device")) as made:
            try:
                save(tmp_path, run.runner, run.state(2), keep=1)
            except CheckpointError as error:
                messages.append(str(error))
            else:
                break
        assert set(names(tmp_path)) <= {before.name, path.name}
        load(before)
        shutil.rmtree(path, ignore_errors=True)  # when the last sync fails it has its name
    assert made == ["mkdir", *["save_file", "fsync"] * 3, "write_text", *["fsync"] * 2, "replace", "fsync", "replace"]
    message = f"checkpoint: cannot write {path}: No space left on device; checkpoints before it are whole"
    assert messages == [message] * 12  # the thirteenth call deletes the older one, which can wait
    assert names(tmp_path) == [before.name, path.name]
    run.train(3, 3)
    again = Run(step=2)
    restore(load(path), again.runner, again.state(0))
    again.train(3, 3)
    assert_same(again.everything(), run.everything())
    save(tmp_path, again.runner, again.state(3), keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_a_kill_at_any_write_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run()
    run.train(1, 1)
    before = save(tmp_path, run.runner, run.state(1))
    run.train(2, 2)
    calls = 0
    for call in range(1, 100):
        with failing(monkeypatch, call, Killed()) as made, monkeypatch.context() as patch:
            patch.setattr(checkpoint_files.Draft, "__exit__", lambda *_: None)  # who is killed does not tidy up
            try:
                save(tmp_path, run.runner, run.state(2))
            except Killed:
                calls += 1
            else:
                break
        found = latest(tmp_path)
        assert found is not None
        load(found)
        assert found == before or made[-2:] == ["replace", "fsync"]
        assert set(names(tmp_path)) <= {".step-00000002.tmp", "step-00000001", "step-00000002"}
        if found == before:
            run.runner.apply(2)
    assert calls >= 11
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_real_limit_on_file_sizes_is_reported_in_a_line(tmp_path: Path) -> None:
    run = Run()
    before = save(tmp_path, run.runner, run.state(0))
    run.train(1, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(CheckpointError, match=r"^checkpoint: cannot write .*step-00000001: [^\n]*File too large"):
            save(tmp_path, run.runner, run.state(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000000"]
    assert latest(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for act in (lambda: check_folder(tmp_path / "file" / "sub"), lambda: save_into(tmp_path / "file")):
        with pytest.raises(CheckpointError, match=r"^checkpoint: cannot write [^\n]*: (Not a directory|File exists)"):
            act()


def save_into(folder: Path) -> None:
    run = Run()
    save(folder, run.runner, run.state(0))


# --- several checkpoints --------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_what_was_never_finished_goes(tmp_path: Path) -> None:
    run = Run("dit", "head")
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    for step in range(1, 5):
        run.train(step, step)
        save(tmp_path, run.runner, run.state(step), keep=2)
    assert names(tmp_path) == ["notes", "step-00000003", "step-00000004"]
    assert latest(tmp_path) == tmp_path / "step-00000004"
    with pytest.raises(UsageError, match=r"^keep: got 0; accepted: an integer >= 1; the newest"):
        save(tmp_path, run.runner, run.state(4), keep=0)


def test_latest_passes_over_what_is_not_whole_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest(tmp_path / "none") is None
    run = Run("dit", "head")
    for step in range(1, 5):
        run.train(step, step)
        save(tmp_path, run.runner, run.state(step), keep=9)
    (tmp_path / "step-00000004" / "state.json").unlink()
    with (tmp_path / "step-00000003" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000007.tmp")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000008")
    assert latest(tmp_path) == tmp_path / "step-00000002"
    assert [record.getMessage().rsplit("; ", 1)[1] for record in caplog.records] == ["passed over"] * 3
    assert "step-00000004 has no state.json" in caplog.text
    assert "step-00000003/model.safetensors has 100 bytes where" in caplog.text
    assert "step-00000008 is of step 2; give it its name back" in caplog.text
    save(tmp_path, run.runner, run.state(4), keep=1)  # a damaged one of that name gives way
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000008"]
    load(tmp_path / "step-00000004")


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    run = Run("dit", "head")
    run.train(1, 1)
    path = save(tmp_path, run.runner, run.state(1))
    before = (path / "state.json").stat().st_mtime_ns
    assert save(tmp_path, run.runner, run.state(1)) == path
    assert (path / "state.json").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"step-00000001 is there already, of another run; take another folder$"):
        save(tmp_path, run.runner, run.state(1, data_sha256="0" * 64))
    assert names(tmp_path) == ["step-00000001"]
    check_folder(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000001 is of a later step than 0, where this run begins"):
        check_folder(tmp_path)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run()
    run.train(1, 1)
    return save(tmp_path_factory.mktemp("saved"), run.runner, run.state(1))


def privacy(**changes: object) -> PrivacyFacts:
    facts = PrivacyFacts(noise_multiplier=1.0, sample_rate=0.01, delta=1e-5, num_charged_steps=1)
    return replace(facts, **changes)  # type: ignore[arg-type]


def test_a_world_size_that_may_change_is_not_compared(tmp_path: Path) -> None:
    run = Run()
    run.train(1, 1)
    older = load(save(tmp_path, run.runner, run.state(1, world_size=None)))
    restore(older, run.runner, run.state(1, world_size=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": privacy(noise_multiplier=0.9)}, "noise_multiplier: 0.9 here, 1.0 in the checkpoint"),
        ({"privacy": privacy(sample_rate=0.02)}, "sample_rate: 0.02 here, 0.01 in the checkpoint"),
        ({"privacy": privacy(delta=None)}, "delta: null here, 1e-05 in the checkpoint"),
        ({"data_sha256": "0" * 64}, "dataset: sha256 000000000000 here, sha256 dadadadadada in the checkpoint"),
        ({"base_sha256": "0" * 64}, r"base weights: sha256 0{12} here, sha256 \w{12} in the checkpoint"),
        ({"workload": "x2"}, 'workload: "x2" here, "dit" in the checkpoint'),
        ({"world_size": 2}, "world_size: 2 here, 1 in the checkpoint"),
        ({"spec": {"sizes": [1, 3], "model": "DiT-S/2"}}, r"spec.sizes: \[1, 3\] here, \[1, 2\] in the checkpoint"),
        (
            {"settings": {"learning_rate": 0.01, "betas": [0.9]}},
            r'settings.betas: \[0.9\] here, nothing in the checkpoint; settings.optimizer: nothing here, "adamw" in .*',
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(changes: dict[str, object], message: str, saved: Path) -> None:
    again = Run()
    before = again.everything()
    with pytest.raises(UsageError, match=rf"^resume: {message}; set these back, or begin anew in another folder$"):
        restore(load(saved), again.runner, again.state(1, **changes))
    assert_same(again.everything(), before)


def test_what_may_differ_on_resume_does(saved: Path) -> None:
    again = Run()
    facts = privacy(num_charged_steps=7, ledger_head="ab" * 32)
    here = again.state(0, privacy=facts, spec={"model": "DiT-S/2", "sizes": [1, 2]}, trainable_only=True)
    restore(load(saved), again.runner, here)


def test_many_differences_stay_one_line(saved: Path) -> None:
    here = Run().state(0, settings={f"option {number}": "x" * 200 for number in range(40)})
    with pytest.raises(UsageError) as raised:
        load(saved).state.require_same_run(here)
    assert str(raised.value).count(" here, ") == 12
    assert "; and 30 more; set these back" in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_a_runner_that_is_not_ready_is_refused(tmp_path: Path) -> None:
    run = Run(schedule=ALL_HEAD_ALL)
    run.train(1, 3)
    with pytest.raises(UsageError, match=r"^state.phase: got 0; accepted: 1, the phase of the runner$"):
        save(tmp_path, run.runner, run.state(1))
    checkpoint = load(save(tmp_path, run.runner, run.state(3)))
    again = Run(schedule=ALL_HEAD_ALL)
    with pytest.raises(UsageError, match=r"^restore: the runner is in phase 0; build it with step=3$"):
        restore(checkpoint, again.runner, again.state(0))
    other = Run(schedule="full", step=3)
    with pytest.raises(CheckpointError, match=r"says step 3 is of phase 1; it is not$"):
        restore(checkpoint, other.runner, other.state(0))
    run.runner.engine.accumulate(run.objective, run.batch)
    for act in (
        lambda: save(tmp_path, run.runner, run.state(3)),
        lambda: restore(checkpoint, run.runner, run.state(3)),
    ):
        with pytest.raises(EngineStateError, match="the engine is within a step; call zero_grad first"):
            act()


def test_another_optimizer_or_model_is_refused(saved: Path) -> None:
    other = Run(optimizer="sgd")
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors does not fit the run: the state of .* is 'exp"):
        restore(load(saved), other.runner, other.state(0))
    x2 = Run("x2")
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit the run: 19 missing \('x2_"):
        restore(load(saved), x2.runner, x2.state(0, base_sha256=load(saved).state.base_sha256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, r"^step: got -1; accepted: an integer >= 0"),
        ({"step": 2**60}, r"^step: got 'a number of 61 bits'; accepted: at most"),
        ({"data_sha256": "abc"}, r"^data_sha256: got 'abc'; accepted: a sha256 in 64 hexadecimal digits"),
        ({"settings": {"x": float("nan")}}, r"^settings: got 'dict'; accepted: what can be kept as JSON"),
        ({"settings": {"x": {1, 2}}}, r"^settings: got \{1, 2\}; accepted: numbers, text, lists and mappings"),
        ({"settings": [1]}, r"^settings: got 'list'; accepted: a mapping or a dataclass"),
        ({"world_size": 0}, r"^world_size: got 0; accepted: an integer >= 1"),
        (
            {"step": 2, "privacy": privacy(ledger_head="ab" * 32)},
            r"^num_charged_steps: got 1; accepted: at least 2, the steps that were made",
        ),
    ],
)
def test_a_state_that_cannot_be_is_refused(changes: dict[str, object], message: str, saved: Path) -> None:
    with pytest.raises(UsageError, match=message):
        replace(load(saved).state, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": -1.0}, r"^noise_multiplier: got -1.0"),
        ({"sample_rate": 1.5}, r"^sample_rate: got 1.5; accepted: a number > 0 and <= 1$"),
        ({"delta": 0.0}, r"^delta: got 0.0"),
        ({"ledger_head": "x"}, r"^ledger_head: got 'x'"),
    ],
)
def test_facts_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        privacy(**changes)


def test_dataclasses_and_tuples_are_kept_as_json(saved: Path) -> None:
    state = replace(load(saved).state, spec={"objective": ObjectiveConfig(), "size": (1, (2, 3))})
    assert state.spec["size"] == [1, [2, 3]]
    assert state.spec["objective"]["path"] == "ddpm-linear"


def test_no_state_of_a_generator_is_kept(saved: Path) -> None:
    text = json.loads((saved / "state.json").read_text())
    assert set(text["state"]) == {field.name for field in fields(CheckpointState)}
    assert set(text["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert not re.search(r"rng|random|generator|seed", json.dumps(text))
    checkpoint = load(saved)
    assert {key.partition("/")[0] for key in checkpoint.optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    parameters = set(dict(Run().model.named_parameters()))
    assert {key.partition("/")[2] for key in checkpoint.optimizer} | set(checkpoint.model) == parameters


def test_the_library_reads_and_writes_nothing_that_could_run() -> None:
    loads = 0
    for path in (ROOT / "dit_dp").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("pickle", "dill", "joblib", "shelve", "marshal", "torch.save", "allow_pickle=True"):
            assert not re.search(rf"\b{word}\b", text), f"{path} says {word}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_file", "np.load"):
                options = {keyword.arg: keyword.value for keyword in node.keywords}
                if ast.unparse(node.func) == "np.load":
                    assert ast.unparse(options["allow_pickle"]) == "False", f"{path} line {node.lineno}"
                    continue
                loads += 1
                assert ast.unparse(node.func) == "torch.load", f"{path} line {node.lineno}"
                assert ast.unparse(options["weights_only"]) == "True", f"{path} line {node.lineno}"
    assert loads == 1


def test_workload_models_without_state_of_their_own_are_whole(tmp_path: Path) -> None:
    for name in ("ddt normed", "panda"):
        run = Run(name)
        checkpoint = load(save(tmp_path / name.split()[0], run.runner, run.state(0)))
        fresh = workload_models.build(name)
        load_trained(fresh, checkpoint)
        assert all(torch.equal(p, dict(run.model.named_parameters())[key]) for key, p in fresh.named_parameters())
