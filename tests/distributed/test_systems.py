"""Every system on FSDP2's shards: parameters that models read themselves, units of several rows, scalars, phases."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dit_dp.clipping import attach
from dit_dp.clipping.batch import Batch, num_rows
from dit_dp.clipping.units import Units
from dit_dp.training import PhaseRunner, Schedule, train_step
from dit_dp.training.shards import shard
from tests.distributed.common import error_after_step, oracle, whole
from tests.distributed.pool import Pool
from tests.models import Case
from tests.workload_models import CASES, build, draw

BK = "ghost_fsdp_bk"
FIRST = 3
"""Units of rank 0; the last one is rank 1's."""


def own_units(units: Units, batch: dict[str, Tensor]) -> tuple[Batch, Units]:
    """Return this rank's rows and units."""
    return units.take(batch, *((0, FIRST) if dist.get_rank() == 0 else (FIRST, units.num_units)))


def sum_error(name: str, method: str) -> float:
    """Return the error of the sum over both ranks' units."""
    objective, batch, row_to_unit = draw(name)
    model = build(name)
    case = Case(model, batch, objective)
    wanted, threshold = oracle(case, method, row_to_unit)
    units = Units.of(num_rows(batch), row_to_unit)
    part, own = own_units(units, batch)
    engine = attach(shard(model, init_device_mesh("cpu", (2,))), method, threshold)
    return error_after_step(engine, case, wanted, [part], row_to_unit=own.row_to_unit)


@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_over_both_ranks_units(on_ranks: Pool, name: str) -> None:
    assert max(on_ranks(sum_error, name, BK)) < 1e-5


def error_of_one_ranks_units(name: str) -> float:
    """Return the error where no rank has a unit at first, and then rank 0 has all."""
    objective, batch, row_to_unit = draw(name)
    model = build(name)
    case = Case(model, batch, objective)
    wanted, threshold = oracle(case, BK, row_to_unit)
    units = Units.of(num_rows(batch), row_to_unit)
    part, own = units.take(batch, 0, units.num_units if dist.get_rank() == 0 else 0)
    none, _ = units.take(batch, 0, 0)
    engine = attach(shard(model, init_device_mesh("cpu", (2,))), BK, threshold)
    norms = engine.accumulate(objective, none, none.get("row_to_unit"))
    assert norms is not None
    assert norms.shape == (0,)
    return error_after_step(engine, case, wanted, [part], row_to_unit=own.row_to_unit)


@pytest.mark.parametrize("name", ["set film", "ddt normed"])
def test_a_rank_without_units_stands_in_with_a_whole_one(on_ranks: Pool, name: str) -> None:
    assert max(on_ranks(error_of_one_ranks_units, name)) < 1e-5


@pytest.mark.parametrize("method", ["ghost", "flash_clip", "per_layer"])
def test_by_other_methods(on_ranks: Pool, method: str) -> None:
    for name in ("set lag", "panda"):
        assert max(on_ranks(sum_error, name, method)) < 1e-5


def trained(name: str, train: str, how: str) -> tuple[list[list[str]], list[float]]:
    """Take a step with noise before each border and after; return what moved in each, and all parameters."""
    model = build(name)
    group = dist.group.WORLD if how == "replicas" else None
    if how == "by block":
        shard(model, init_device_mesh("cpu", (2,)))
    elif how == "whole":  # all of it stays gathered after a forward without gradients
        fully_shard(model, ignored_params={p for p in model.parameters() if p.dim() == 0})
    runner = PhaseRunner(
        model,
        Schedule.parse(train),
        attach=partial(attach, method=BK, process_group=group),
        make_optimizer=partial(torch.optim.AdamW, lr=0.01, foreach=True),
        ema_decay=0.5,
    )
    objective, batch, row_to_unit = draw(name)
    units = Units.of(num_rows(batch), row_to_unit)
    part, own = own_units(units, batch)
    generator = torch.Generator().manual_seed(3)
    moved = []
    for step in (1, 2, 3, 4):
        before = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
        runner.apply(step)
        train_step(
            runner.engine,
            runner.optimizer,
            objective,
            [part],
            noise_multiplier=0.1,
            expected_batch_size=4,
            generator=generator,
            ema=runner.ema,
            row_to_unit=lambda _: own.row_to_unit,
        )
        with torch.no_grad():
            objective(model, part)  # as a validation loss: the root's parameters stay gathered
        after = {name: whole(p.detach()) for name, p in runner.engine.model.named_parameters()}
        moved.append([name for name, value in after.items() if not torch.equal(value, before[name])])
    runner.engine.detach()
    parameters = [whole(p.detach()).flatten() for p in model.parameters()]
    averages = [whole(average).flatten() for average in runner.averages.values()]
    return moved, torch.cat(parameters + averages).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "train", "how"),
    [
        ("set lag", "full:1-1,encoder:2-3,full:4-", "by block"),
        ("panda", "head:1-2,full:3-", "whole"),
        pytest.param("set film", "encoder:1-2,full:3-", "by block", marks=pytest.mark.full),
        pytest.param("set film", "encoder:1-2,full:3-", "whole", marks=pytest.mark.full),
        pytest.param("ddt", "head:1-1,full:2-2,encoder:3-", "by block", marks=pytest.mark.full),
        pytest.param("ddt", "head:1-1,full:2-2,encoder:3-", "whole", marks=pytest.mark.full),
    ],
)
def test_phases_are_those_of_replicas(on_ranks: Pool, name: str, train: str, how: str) -> None:
    (moved, shards), other = on_ranks(trained, name, train, how)
    replicas = on_ranks(trained, name, train, "replicas")[0]
    assert other == (moved, shards)
    assert moved == replicas[0]
    assert len({len(names) for names in moved}) > 1
    torch.testing.assert_close(torch.tensor(shards), torch.tensor(replicas[1]))
