"""Two ranks cross the border of a phase alike."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dit_dp.clipping import attach
from dit_dp.training import Phase, PhaseRunner, Schedule, train_step
from tests.distributed.common import mine
from tests.distributed.pool import Pool
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit

SCHEDULE = Schedule(phases=(Phase(groups=("head",), end=1), Phase(groups=("all",), start=2)))


def moved_and_sum(wrapped: bool) -> tuple[set[str], set[str], float]:
    """Return what moved in a step of each phase, and the sum of all parameters after them."""
    model = tiny_dit()
    runner = PhaseRunner(
        DistributedDataParallel(model) if wrapped else model,
        SCHEDULE,
        attach=partial(attach, method="bookkeeping", process_group=None if wrapped else dist.group.WORLD),
        make_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    )
    moved: list[set[str]] = []
    for step in (1, 2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        runner.apply(step)
        own = [mine(draw())]
        train_step(runner.engine, runner.optimizer, OBJECTIVE, own, noise_multiplier=0.5, expected_batch_size=4)
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    runner.engine.detach()
    return moved[0], moved[1], sum(float(p.detach().double().sum()) for p in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
def test_replicas_freeze_and_unfreeze_alike(on_ranks: Pool, wrapped: bool) -> None:
    (frozen, full, total), other = on_ranks(moved_and_sum, wrapped)
    assert other == (frozen, full, total)
    assert all(name.startswith("final_layer.") for name in frozen)
    assert len(frozen) == 4
    assert full == {name for name, _ in tiny_dit().named_parameters()} - {"pos_embed"}
