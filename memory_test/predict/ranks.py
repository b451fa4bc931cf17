"""One rank among several that are not there: a process group that sends nothing, DDP or FSDP2 around the model.

Every other rank is taken to be like this one, the first. What DDP and FSDP2 take is predicted by their own code.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from dit_dp.errors import UsageError
from dit_dp.training.shards import shard
from memory_test.core.measure import Wrap
from memory_test.predict.tracer import Tracer


@contextlib.contextmanager
def imagined_ranks(tracer: Tracer, world_size: int, sharding: str) -> Iterator[Wrap]:
    """Be rank 0 of a group whose other ranks are not there; yield what makes a model this rank's replica or shard.

    Args:
        tracer: Writes the log.
        world_size: Ranks in the group.
        sharding: ``ddp`` or ``fsdp2``.

    Raises:
        UsageError: This process is in a group already.
    """
    if dist.is_initialized():
        raise UsageError("world_size: this process is in a process group already; predict outside of torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,))  # now: its table of ranks is data
        with _objects_are_alike(), _shapes_unseen(tracer), warnings.catch_warnings():
            # What a block returns may be a view, of which FSDP2 warns; the loop does nothing to it in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield (lambda model: shard(model, mesh)) if sharding == "fsdp2" else replicate
    finally:
        dist.destroy_process_group()


def replicate(model: nn.Module) -> nn.Module:
    """Put DDP around a model; parameters are not compared or copied, which is the model phase's and takes data."""
    return DistributedDataParallel(model, init_sync=False)


@contextlib.contextmanager
def _objects_are_alike() -> Iterator[None]:
    """Have every rank say what this one says: objects travel as bytes, of which tensors without data have none."""
    c10d: Any = dist
    gather, broadcast = c10d.all_gather_object, c10d.broadcast_object_list

    def gathered(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def broadcasted(*args: Any, **kwargs: Any) -> None:
        """Leave the first rank's as they are: this is it."""

    c10d.all_gather_object, c10d.broadcast_object_list = gathered, broadcasted
    try:
        yield
    finally:
        c10d.all_gather_object, c10d.broadcast_object_list = gather, broadcast


@contextlib.contextmanager
def _shapes_unseen(tracer: Tracer) -> Iterator[None]:
    """Have the tensors by which `DTensor` derives shapes stay out of the log: they never hold data."""
    propagator: Any = ShardingPropagator
    propagate = propagator._propagate_tensor_meta_non_cached

    def unseen(self: Any, schema: Any) -> Any:
        with tracer.silence():
            return propagate(self, schema)

    propagator._propagate_tensor_meta_non_cached = unseen
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = propagate
