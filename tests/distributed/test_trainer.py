"""A run on two ranks is the run on one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dit_dp.errors import UsageError
from dit_dp.trainer.budget import plan_budget
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.data import open_data
from dit_dp.trainer.run import Run
from dit_dp.trainer.trainer import Trainer
from dit_dp.trainer.world import World
from dit_dp.workloads import build_model
from tests.distributed.pool import SIZE, Pool, alone

STEPS = 3


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    tiny: dict[str, Any] = {
        "data": "digits",
        "in_channels": 3,
        "image_size": 8,
        "model": "DiT-S/2",
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 10,
        "batch_size": 6,
        "steps": STEPS,
        "noise_multiplier": 0.7,
        "method": "ghost",
        "physical_batch_size": 2,
        "insecure_seed": 3,
        "ema_decay": 0.5,
        "device": "cpu",
        "output_dir": folder,
    }
    return TrainConfig(**{**tiny, **changes})


def trained(folder: Path, together: bool, changes: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Train; return each parameter's name and two sums over it, and over its average."""
    config = config_of(folder, **changes)
    rank, size = (dist.get_rank(), SIZE) if together else (0, 1)
    group = dist.group.WORLD if together else alone()
    world = World(rank=rank, size=size, device=torch.device("cpu"), group=group)
    spec = config.spec
    data = open_data(config, spec, folder, world.device)
    own = folder / f"{dist.get_rank()}-{together}-{config.sharding}"
    own.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.init_seed)
    trainer = Trainer(config, spec, data, plan_budget(config, spec, len(data.train)), world, own, build_model(spec))
    for _ in trainer.steps():
        pass
    values = {name: whole(p.detach()) for name, p in trainer.runner.model.named_parameters()}
    averages = {name: whole(average) for name, average in trainer.runner.averages.items()}
    trainer.close()
    return [(name, spread(p), spread(averages.get(name, p))) for name, p in values.items()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor at full shape."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(tensor: torch.Tensor) -> float:
    """Return a sum with weights, which tells tensors apart."""
    weights = torch.linspace(0.5, 1.5, tensor.numel(), dtype=torch.float64)
    return float((tensor.flatten().double() * weights).sum())


SHARDS: dict[str, Any] = {"sharding": "fsdp2", "method": "auto"}


@pytest.mark.parametrize("phases", [{}, {"train": "head:1-1,full:2-"}], ids=["one phase", "two phases"])
@pytest.mark.parametrize("changes", [{}, SHARDS], ids=["replicas", "shards"])
def test_two_ranks_give_the_parameters_of_one(
    on_ranks: Pool, tmp_path: Path, changes: dict[str, Any], phases: dict[str, Any]
) -> None:
    first, second = on_ranks(trained, tmp_path, True, {**changes, **phases})
    one, _ = on_ranks(trained, tmp_path, False, phases)
    assert [name for name, _, _ in first] == [name for name, _, _ in one]
    for mine, other, wanted in zip(first, second, one, strict=True):
        assert mine[1:] == pytest.approx(other[1:], rel=1e-6)
        assert mine[1:] == pytest.approx(wanted[1:], rel=1e-4, abs=1e-5), mine[0]


SETS: dict[str, Any] = {
    "workload": "set",
    "data": "digits",
    "model": None,
    "num_classes": None,
    "model_options": ("sample_size=3",),
    "set_remainder": "drop",
}


def ended(folder: Path, changes: dict[str, Any]) -> tuple[list[str], int]:
    """Train with all that a run does besides steps; return what it wrote, and how many lines of numbers."""
    world = World(rank=dist.get_rank(), size=SIZE, device=torch.device("cpu"), group=dist.group.WORLD)
    looks: dict[str, Any] = {"held_out": 0.2, "log_every": 2, "num_samples": 2, "sample_every": 2}
    Run(config_of(folder, **SHARDS, **looks, **changes), world).go()
    (run,) = folder.glob("0*")
    numbers = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["validation_loss"] > 0 for line in numbers if line["step"] > 1)
    return sorted(path.name for path in run.iterdir()), len(numbers)


@pytest.mark.parametrize("changes", [{"train": "head:1-1,full:2-"}, SETS], ids=["dit", "set"])
def test_a_run_on_shards_validates_and_samples(on_ranks: Pool, tmp_path: Path, changes: dict[str, Any]) -> None:
    (files, lines), other = on_ranks(ended, tmp_path, changes)
    assert other == (files, lines)
    assert {"samples", "checkpoints", "summary.json"} <= set(files)
    assert lines == STEPS


def refusal(folder: Path, changes: list[dict[str, Any]]) -> str:
    """Return what a process says of a run that it refuses."""
    rank = dist.get_rank()
    try:
        world = World(rank=rank, size=SIZE, device=torch.device("cpu"), group=dist.group.WORLD)
        Run(config_of(folder, **changes[rank]), world)
    except (UsageError, SystemExit) as error:
        return str(error)
    return "no refusal"


def test_a_mistake_is_said_once(on_ranks: Pool, tmp_path: Path) -> None:
    first, second = on_ranks(refusal, tmp_path, [{"batch_size": 9999}] * 2)
    assert "batch_size: got 9999" in first
    assert second == "2"  # the exit code, without a word


def test_ranks_with_other_data_are_refused(on_ranks: Pool, tmp_path: Path) -> None:
    other = [{"data": "synthetic", "num_synthetic": count} for count in (20, 21)]
    for said in on_ranks(refusal, tmp_path, other):
        assert "the same images, in every process" in said
