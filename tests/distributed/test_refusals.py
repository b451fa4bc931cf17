"""What does not run on FSDP2's shards: parameters that models read themselves, scalars, and borders of phases."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dit_dp.clipping import attach
from dit_dp.errors import UsageError
from dit_dp.training import PhaseRunner, Schedule
from dit_dp.training.shards import shard
from tests.distributed.pool import Pool
from tests.workload_models import build, draw

BK = "ghost_fsdp_bk"
RAW = "is read by the model's own code, which cannot be followed under FSDP2"


def outcome(name: str, train: str, options: dict[str, bool]) -> str:
    """Return what is said of one case on shards."""
    try:
        model = shard(build(name, **options), init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = partial(torch.optim.SGD, lr=0.1)
        runner = PhaseRunner(model, Schedule.parse(train), attach=partial(attach, method=BK), make_optimizer=optimizer)
        objective, batch, units = draw(name)
        runner.engine.accumulate(objective, batch, units)
        runner.engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    except UsageError as error:
        return str(error)
    return "runs"


@pytest.mark.parametrize(
    ("name", "train", "options", "said"),
    [
        ("x2", "x2", {}, f"parameter x2_cls_tokens {RAW}"),
        ("x2", "x2", {"x2_use_cls": False}, "runs"),
        ("set film", "full", {}, ".temperature is a scalar, which FSDP2 cannot cut"),
        ("set film", "encoder:1-", {}, ".temperature is a scalar, which FSDP2 cannot cut"),
        ("set lag", "full", {}, f"parameter encoder.cls_token {RAW}"),
        ("panda", "full", {}, f"parameter pos_embed {RAW}"),
        ("panda", "head", {}, "runs"),
        ("ddt", "full", {}, "runs"),
        ("ddt", "encoder:1-2,full:3-", {}, "schedule: got several phases, but the model's parameters are sharded"),
    ],
)
def test_what_runs_on_shards(on_ranks: Pool, name: str, train: str, options: dict[str, bool], said: str) -> None:
    for found in on_ranks(outcome, name, train, options):
        assert said in found
        assert "\n" not in found
