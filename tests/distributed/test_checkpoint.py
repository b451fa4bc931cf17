"""Two ranks write one checkpoint, whole, and go on from it in whatever way they hold their parameters."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dit_dp.clipping import attach
from dit_dp.training import PhaseRunner, Schedule, train_step
from dit_dp.training.checkpoint import latest, load, restore, save
from tests.checkpoints import state_of
from tests.distributed.common import message_of, mine, whole
from tests.distributed.pool import Pool, alone
from tests.distributed.test_shards import UNEVEN, sharded_dit
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit

KINDS = ("ddp", "replicas", "shards")


def runner_of(kind: str, step: int = 1) -> PhaseRunner:
    """Return a runner whose model both ranks hold in some way; `alone`: each has its own."""
    model: nn.Module = sharded_dit() if kind == "shards" else tiny_dit(**UNEVEN)
    group = {"replicas": dist.group.WORLD, "alone": alone()}.get(kind)
    method = "ghost_fsdp_bk" if kind == "shards" else "bookkeeping"
    return PhaseRunner(
        DistributedDataParallel(model) if kind == "ddp" else model,
        Schedule(),
        attach=partial(attach, method=method, process_group=group),
        make_optimizer=partial(torch.optim.AdamW, lr=1e-2),
        ema_decay=0.5,
        step=step,
    )


def train(runner: PhaseRunner, first: int, last: int) -> None:
    for step in range(first, last + 1):
        runner.apply(step)
        own = [mine(draw())]
        train_step(
            runner.engine,
            runner.optimizer,
            OBJECTIVE,
            own,
            noise_multiplier=0.0,
            expected_batch_size=4,
            ema=runner.ema,
        )


def everything(runner: PhaseRunner) -> dict[str, torch.Tensor]:
    """Return all that must come back, at full shape."""
    found = {f"average {name}": whole(average).clone() for name, average in runner.averages.items()}
    for name, parameter in runner.engine.parameters.items():
        found[name] = whole(parameter.detach()).clone()
        state = runner.optimizer.state[parameter]
        found |= {f"{kind} {name}": whole(value).clone() for kind, value in state.items()}
    return found


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def resumed(kind: str, folder: Path) -> list[str]:
    """Return what differs between a run that went on and one that was resumed."""
    runner = runner_of(kind)
    train(runner, 1, 2)
    path = save(folder, runner, state_of(runner, 2))
    saved = everything(runner)
    train(runner, 3, 3)
    again = runner_of(kind, step=2)
    restore(load(path), again, state_of(again, 0))
    found = differences(everything(again), saved)
    train(again, 3, 3)
    found += differences(everything(again), everything(runner))
    runner.engine.detach()
    again.engine.detach()
    return found


def test_replicas_and_shards_resume_as_they_were(on_ranks: Pool, tmp_path: Path) -> None:
    for kind in KINDS:
        assert on_ranks(resumed, kind, tmp_path / kind) == [[], []], kind
        assert [path.name for path in (tmp_path / kind).iterdir()] == ["step-00000002"]


def from_shards_to_one(folder: Path) -> list[str]:
    """Return what differs between shards and a rank alone that read their checkpoint, and after the reverse."""
    runner = runner_of("shards")
    train(runner, 1, 2)
    path = save(folder, runner, state_of(runner, 2))
    single = runner_of("alone", step=2)
    restore(load(path), single, state_of(single, 0))
    found = differences(everything(single), everything(runner))
    again = runner_of("shards", step=2)
    restore(load(path), again, state_of(again, 0))
    return found + differences(everything(again), everything(single))


def test_a_checkpoint_of_shards_is_whole(on_ranks: Pool, tmp_path: Path) -> None:
    assert on_ranks(from_shards_to_one, tmp_path) == [[], []]


def messages_when_the_first_cannot_write(folder: Path) -> str:
    runner = runner_of("shards")
    text = message_of(lambda: save(folder / "file" / "sub", runner, state_of(runner, 0)))
    path = save(folder / "checkpoints", runner, state_of(runner, 0))  # nobody was left waiting
    assert latest(folder / "checkpoints") == path
    return text


def test_every_rank_hears_that_the_first_cannot_write(on_ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one, other = on_ranks(messages_when_the_first_cannot_write, tmp_path)
    assert one == other
    assert one.startswith("checkpoint: cannot write ")
