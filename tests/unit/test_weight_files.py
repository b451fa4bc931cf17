import argparse
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dit_dp.errors import CheckpointError, UsageError
from dit_dp.models.dit import DiT, randomize_zero_init_
from dit_dp.models.files import load_into, load_weights
from dit_dp.models.weights import diffusers_to_reference, reference_to_diffusers
from tests.workload_models import DIT


def dit(seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    model = DiT(**DIT)
    randomize_zero_init_(model, torch.Generator().manual_seed(seed), std=0.1)
    return model


def same(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_published_checkpoint_loads_unchanged(suffix: str, zipped: bool, tmp_path: Path) -> None:
    published = dit(seed=1)
    torch.save(published.state_dict(), path := tmp_path / f"DiT{suffix}", _use_new_zipfile_serialization=zipped)
    model = dit()
    assert not same(model, published)
    load_into(model, load_weights(path))
    assert same(model, published)


def test_safetensors_and_diffusers_names(tmp_path: Path) -> None:
    published = dit(seed=1)
    save_file(published.state_dict(), tmp_path / "a.safetensors")
    save_file(reference_to_diffusers(published.state_dict()), tmp_path / "b.safetensors")
    model = dit()
    load_into(model, load_weights(str(tmp_path / "a.safetensors")))
    assert same(model, published)
    model, theirs = dit(), load_weights(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"these are diffusers' names: map them by .*diffusers_to_reference$"):
        load_into(model, theirs)
    load_into(model, diffusers_to_reference(theirs, latent_size=8))
    assert same(model, published)


def test_a_training_checkpoint_of_the_reference_gives_its_average(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With everything that it holds: the optimizer, and the command line as a Namespace."""
    caplog.set_level(logging.INFO)
    average, model = dit(seed=1), dit(seed=2)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4, results=None),
    }
    torch.save(content, path := tmp_path / "0400000.pt")
    for key, wanted in ((None, average), ("model", model), ("ema", average)):
        loaded = dit()
        load_into(loaded, load_weights(path, key=key))
        assert same(loaded, wanted)
    assert [r.getMessage() for r in caplog.records] == [f"weights: {path} holds model, ema, opt, args; took 'ema'"]
    with pytest.raises(UsageError, match=r"^key: got 'teacher'; accepted: model, ema, opt, args; the entries of"):
        load_weights(path, key="teacher")
    with pytest.raises(CheckpointError, match=r"entry 'state' is no dense tensor but a dict$"):
        load_weights(path, key="opt")
    with pytest.raises(CheckpointError, match=r"holds a Namespace where tensors by name are expected$"):
        load_weights(path, key="args")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], r"holds a list; accepted: tensors by name$"),
        ({"teacher": {}, "epoch": 3}, r"^key: got None; accepted: teacher, epoch; .* has no entry ema or model or"),
        ({"a": torch.zeros(2), "b": 3}, r"entry 'b' is no dense tensor but a int$"),
        ({"a": torch.zeros(2).to_sparse()}, r"entry 'a' is no dense tensor but a Tensor$"),
        ({"model": {}}, r"holds an empty mapping where tensors by name are expected$"),
        ({3: torch.zeros(2)}, r"entry 3 is no dense tensor"),
    ],
)
def test_what_is_no_table_of_weights_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, path := tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=message):
        load_weights(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"")
    (tmp_path / "weights.safetensors").write_bytes(b"12")
    for name, message in (
        ("none.pt", r"there is no such file$"),
        (".", r"there is no such file$"),
        ("weights.npz", r"accepted: a file that ends in .safetensors, .pt, .pth, .ckpt, .bin$"),
        ("weights.safetensors", r"is no whole safetensors file"),
    ):
        with pytest.raises(UsageError, match=message):
            load_weights(tmp_path / name)
    with pytest.raises(UsageError, match=r"^key: got 'ema'; accepted: None; a safetensors file has no entries"):
        load_weights(tmp_path / "weights.safetensors", key="ema")


def test_names_and_shapes_that_do_not_fit_are_counted_and_nothing_is_changed() -> None:
    model, tensors = dit(), dict(dit(seed=1).state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(5):
        tensors[f"more.{number}"] = torch.zeros(1)
    del tensors["pos_embed"]
    tensors["x_embedder.proj.bias"] = torch.zeros(7)
    tensors["final_layer.linear.bias"] = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(CheckpointError) as raised:
        load_into(model, tensors)
    assert str(raised.value) == (
        "weights: they do not fit DiT: 1 missing (pos_embed); 5 unexpected (more.0, more.1, more.2 and 2 more); "
        "2 of another shape (x_embedder.proj.bias (7,), here (16,), final_layer.linear.bias (32,), here (32,))"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_loose_loading_says_what_it_leaves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, published = dit(), dit(seed=1)
    tensors = {**published.state_dict(), "more": torch.zeros(1)}
    del tensors["pos_embed"]
    load_into(model, tensors, strict=False)
    assert caplog.records[0].getMessage() == "weights: 1 missing (pos_embed); 1 unexpected (more)"
    assert same(model, published)
    tensors["x_embedder.proj.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_into(model, tensors, strict=False)


def test_one_name_is_enough_for_tied_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    load_into(model, {"b.weight": torch.ones(2, 2)})
    assert torch.equal(model["a"].weight, torch.ones(2, 2))


def test_half_precision_models_take_full_weights() -> None:
    model = nn.Linear(2, 2).bfloat16()
    load_into(model, {"weight": torch.full((2, 2), 1.001), "bias": torch.zeros(2)})
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, torch.ones(2, 2).bfloat16())


def test_sharded_models_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.device_mesh = "a mesh"  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"^weights: parameter weight is sharded already; load weights before fully_"):
        load_into(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert not torch.equal(model.bias, torch.ones(2))
