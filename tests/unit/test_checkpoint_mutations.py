"""Damaged and forged checkpoints: none runs anything, each is refused by name and leaves the run as it was."""

import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_dp.errors import CheckpointError, UsageError
from dit_dp.models.files import load_weights
from dit_dp.training.checkpoint import latest, load, restore, save
from dit_dp.training.checkpoint_files import _hash
from dit_dp.training.checkpoint_state import seal
from tests.checkpoints import Run, assert_same

NUM_MUTATIONS = 100
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
TENSORS = FILES[:3]
CANARY = "canary"

Mutation = Callable[[Path, random.Random], None]


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def a_pickle(path: Path) -> bytes:
    return pickle.dumps({"model": Canary(path.parent / CANARY)})


def a_torch_file(path: Path) -> bytes:
    torch.save({"model": Canary(path.parent / CANARY)}, buffer := io.BytesIO())
    return buffer.getvalue()


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the state says and seal it again, as a forger would."""
    body = json.loads((path / "state.json").read_text())
    del body["sha256"]
    change(body)
    body["sha256"] = seal(body)
    (path / "state.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def reseal_files(path: Path) -> None:
    """Make the state agree with what the files hold now."""

    def change(body: dict[str, Any]) -> None:
        for name in body["files"]:
            file = path / name
            body["files"][name] = {"num_bytes": file.stat().st_size, "sha256": _hash(file)}

    reseal(path, change)


# --- damage ---------------------------------------------------------------------------------------------------


def truncated(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(FILES)
    with file.open("r+b") as handle:
        handle.truncate(rng.randrange(file.stat().st_size))


def flipped_bit(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def longer(path: Path, rng: random.Random) -> None:
    with (path / rng.choice(FILES)).open("ab") as handle:
        handle.write(rng.randbytes(rng.randrange(1, 100)))


def missing(path: Path, rng: random.Random) -> None:
    (path / rng.choice(FILES)).unlink()


def noise_for_a_file(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(FILES)
    file.write_bytes(rng.randbytes(file.stat().st_size))


def extra_file(path: Path, rng: random.Random) -> None:
    (path / rng.choice(["hooks.py", "data.pkl", ".hidden", "step.safetensors", "new\nline"])).write_bytes(
        a_pickle(path)
    )


def link_out(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(FILES)
    outside = path.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)


def exchanged_files(path: Path, rng: random.Random) -> None:
    one, other = rng.sample(TENSORS, 2)
    (path / one).rename(path / "tmp")
    (path / other).rename(path / one)
    (path / "tmp").rename(path / other)
    if rng.random() < 0.5:
        reseal_files(path)


# --- a state that says something else ---------------------------------------------------------------------------


def places(body: Any, kinds: tuple[type, ...]) -> list[tuple[Any, str]]:
    """Return where a JSON value holds leaves of these types, but in what a run may set freely."""
    found = []
    for key, value in body.items():
        if isinstance(value, dict):
            found += [] if key in ("spec", "settings") else places(value, kinds)
        elif isinstance(value, kinds) and not isinstance(value, bool):
            found.append((body, key))
    return found


def wrong_type(path: Path, rng: random.Random) -> None:
    def change(body: dict[str, Any]) -> None:
        holder, key = rng.choice(places(body, (int, float, str, type(None))))
        junk = [[], {"a": 1}, [[1]], "text", True, {"__reduce__": "os.system"}, "\ud800"]
        holder[key] = rng.choice(junk[:3] if isinstance(holder[key], str) else junk)

    reseal(path, change)


def huge_number(path: Path, rng: random.Random) -> None:
    def change(body: dict[str, Any]) -> None:
        holder, key = rng.choice(places(body, (int,)))
        holder[key] = rng.choice([10**30, -(10**30), 2**63, 2**53 + 1, 10**4000, -1])

    reseal(path, change)


def no_number(path: Path, rng: random.Random) -> None:
    file = path / "state.json"
    literal = rng.choice(["1e999", "NaN", "-Infinity", "9" * 5000])
    file.write_text(file.read_text().replace('"delta": 1e-05', f'"delta": {literal}'))


def out_of_the_folder(path: Path, rng: random.Random) -> None:
    name = rng.choice(["../model.safetensors", "/etc/passwd", "..", "a/../../x", "model.safetensors\0", "con", ""])
    outside = path.parent / "model.safetensors"
    shutil.copy(path / "model.safetensors", outside)

    def change(body: dict[str, Any]) -> None:
        facts = body["files"].pop("ema.safetensors") if rng.random() < 0.5 else body["files"]["model.safetensors"]
        body["files"][name] = facts

    reseal(path, change)


def unknown_or_missing_field(path: Path, rng: random.Random) -> None:
    def change(body: dict[str, Any]) -> None:
        holder = rng.choice([body, body["state"], body["state"]["privacy"], body["files"]["model.safetensors"]])
        if rng.random() < 0.5:
            holder["rng_state"] = [1, 2, 3]
        else:
            del holder[rng.choice([key for key in holder if key not in ("delta", "ledger_head", "world_size")])]
            body.setdefault("files", {})

    reseal(path, change)


def nested_deeply(path: Path, rng: random.Random) -> None:
    depth = rng.choice([17, 400, 100_000])
    file = path / "state.json"
    text = file.read_text().replace('"learning_rate": 0.01', '"learning_rate": ' + "[" * depth + "]" * depth)
    file.write_text(text)
    if depth < 500:
        reseal(path, lambda body: None)


def not_an_object(path: Path, rng: random.Random) -> None:
    junk = ["[]", "null", '"step"', "1", "", "{", "\ufeff{}", "{}" * 2, '{"version": 1}', "\x80"]
    (path / "state.json").write_bytes(rng.choice(junk).encode("latin-1", "replace"))


def newer_version(path: Path, rng: random.Random) -> None:
    reseal(path, lambda body: body.update(rng.choice([{"version": 2}, {"format": "zip"}, {"version": True}])))


def edited_by_hand(path: Path, rng: random.Random) -> None:
    file = path / "state.json"
    text = file.read_text()
    edits = [('"noise_multiplier": 1.0', '"noise_multiplier": 0.1'), ('"step": 1', '"step": 0'), ("\n ", "\n  ")]
    file.write_text(text.replace(*rng.choice(edits)))


# --- tensors that are not the run's -----------------------------------------------------------------------------


def forged_tensors(path: Path, rng: random.Random) -> None:
    """Change names, shapes or types of tensors, and make the state agree."""
    file = path / rng.choice(TENSORS)
    tensors = load_file(file)
    names = [name for name in sorted(tensors) if tensors[name].dim()]
    one = rng.choice(names)
    kind = rng.choice(["rename", "drop", "shape", "dtype", "exchange", "add"])
    if kind == "rename":
        tensors[f"{one}x"] = tensors.pop(one)
    elif kind == "drop":
        del tensors[one]
    elif kind == "shape":
        tensors[one] = tensors[one].flatten()[:-1].clone()
    elif kind == "dtype":
        tensors[one] = tensors[one].double()
    elif kind == "add":
        tensors[rng.choice(["../x", "exp_avg/", "__reduce__", "a\nb"])] = torch.zeros(2)
    else:
        other = rng.choice([name for name in names if tensors[name].shape != tensors[one].shape])
        tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file)
    reseal_files(path)


def forged_header(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(TENSORS)
    content = bytearray(file.read_bytes())
    kind = rng.choice(["length", "offsets", "text", "empty"])
    if kind == "length":
        content[:8] = rng.choice([2**63, 2**32, len(content), 0]).to_bytes(8, "little")
    elif kind == "offsets":
        place = content.index(b'"data_offsets":[') + 16
        content[place : place + 1] = b"8" if content[place : place + 1] == b"9" else b"9"
    elif kind == "text":
        content[8:12] = b"\xff\xfe[["
    else:
        content = bytearray()
    file.write_bytes(content)
    reseal_files(path)


def a_pickle_by_another_name(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(FILES)
    file.write_bytes(rng.choice([a_pickle, a_torch_file])(path))
    if file.name != "state.json" and rng.random() < 0.7:
        reseal_files(path)


MUTATIONS: tuple[Mutation, ...] = (
    truncated,
    flipped_bit,
    a_pickle_by_another_name,
    wrong_type,
    forged_tensors,
    out_of_the_folder,
    huge_number,
    exchanged_files,
    extra_file,
    forged_header,
    unknown_or_missing_field,
    edited_by_hand,
    no_number,
    nested_deeply,
    link_out,
    not_an_object,
    longer,
    missing,
    noise_for_a_file,
    newer_version,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run()
    run.train(1, 1)
    return save(tmp_path_factory.mktemp("whole"), run.runner, run.state(1))


@pytest.fixture(scope="module")
def again() -> Run:
    return Run()


def refuse(seed: int, whole: Path, again: Run, folder: Path) -> None:
    """Mutate a copy of a checkpoint, and see that it is refused."""
    path = folder / whole.name
    shutil.copytree(whole, path)
    mutate = MUTATIONS[seed % len(MUTATIONS)]
    mutate(path, random.Random(seed))
    before = again.everything()
    with pytest.raises(CheckpointError) as raised:
        restore(load(path), again.runner, again.state(1))
    text = str(raised.value)
    assert text.startswith(("checkpoint: ", "weights: ")), text
    assert "\n" not in text
    assert len(text) < 1000
    assert str(path) in text
    assert latest(folder) in (None, path)
    assert_same(again.everything(), before)
    assert not list(folder.rglob(CANARY))
    shutil.rmtree(path)


@pytest.mark.parametrize("seed", range(len(MUTATIONS)), ids=[mutation.__name__ for mutation in MUTATIONS])
def test_a_mutated_checkpoint_is_refused(seed: int, whole: Path, again: Run, tmp_path: Path) -> None:
    refuse(seed, whole, again, tmp_path)


@pytest.mark.full
def test_all_mutated_checkpoints_are_refused(
    whole: Path, again: Run, tmp_path: Path, stated: Callable[[str, int], None]
) -> None:
    """The stated count."""
    stated("damaged or forged checkpoints", NUM_MUTATIONS)
    for seed in range(NUM_MUTATIONS):
        (tmp_path / str(seed)).mkdir()
        refuse(seed, whole, again, tmp_path / str(seed))


def test_a_forger_who_keeps_to_the_rules_is_of_another_run(whole: Path, again: Run, tmp_path: Path) -> None:
    """A seal is no signature: other numbers under a new seal are another run's, and refused as that."""
    shutil.copytree(whole, path := tmp_path / whole.name)
    reseal(path, lambda body: body["state"]["privacy"].update(noise_multiplier=1e300))
    with pytest.raises(UsageError, match=r"^resume: noise_multiplier: 1.0 here, 1e\+300 in the checkpoint"):
        restore(load(path), again.runner, again.state(1))


def test_the_unchanged_checkpoint_and_the_canary_work(whole: Path, tmp_path: Path) -> None:
    """Without this the tests above could pass for nothing."""
    run = Run()
    restore(load(whole), run.runner, run.state(1))
    shutil.copytree(whole, path := tmp_path / whole.name)
    reseal_files(path)
    load(path)
    pickle.loads(a_pickle(path))["model"].close()
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize("seed", range(6))
def test_a_mutated_torch_file_runs_nothing(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    file = tmp_path / f"weights{rng.choice(['.pt', '.pth', '.ckpt', '.bin'])}"
    torch.save({"model": {"a": torch.zeros(3)}}, file, _use_new_zipfile_serialization=seed % 2 == 0)
    content = bytearray(file.read_bytes())
    if seed < 2:
        content = bytearray([a_pickle, a_torch_file][seed](file))
    elif seed < 4:
        del content[rng.randrange(len(content)) :]
    else:
        content[:40] = rng.randbytes(40)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^weights: [^\n]* is damaged or holds more than tensors") as raised:
        load_weights(file)
    assert len(str(raised.value)) < 1000
    assert not (tmp_path / CANARY).exists()


def test_a_torch_file_whose_archive_holds_code_runs_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("weights/data.pkl", a_pickle(tmp_path / "x"))
        archive.writestr("weights/version", "3")
    with pytest.raises(CheckpointError, match=r"^weights: "):
        load_weights(tmp_path / "weights.pt")
    assert not (tmp_path / CANARY).exists()
