"""Find out over which ranks a model is trained: one process, replicas of it (plain or DDP), or FSDP2's shards."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dit_dp.clipping.gathered import fsdp_is_loaded
from dit_dp.clipping.ranks import Ranks, Replicas
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UnsupportedModelError, UsageError


def join(model: nn.Module, method: str, process_group: dist.ProcessGroup | None) -> tuple[nn.Module, Ranks]:
    """Return the module that a method is to be attached to, and its ranks.

    Args:
        model: A plain model, `DistributedDataParallel` around one, or one that was given to `fully_shard`.
        method: A key of `METHODS`.
        process_group: For a plain model, the ranks that train it together; else `None` or DDP's own.

    Raises:
        UsageError: Several ranks run, and nothing says which of them train together; or the method is for one.
        UnsupportedModelError: The model is distributed in a way that no method can follow.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise UsageError("process_group: torch.distributed is not initialised; call init_process_group() first")
        return model, Ranks()
    _check_group(process_group)
    if isinstance(model, DistributedDataParallel):
        module, ranks = model.module, _ranks_of_ddp(model, process_group)
    else:
        module, ranks = model, _ranks_of(model, process_group)
    if not ranks.alone and METHODS[method].peer:
        ours = [name for name, facts in METHODS.items() if not facts.peer]
        raise UsageError.for_value("method", method, ours, "peers are measured on one rank")
    if ranks.in_step and not METHODS[method].sharded:
        able = [name for name, facts in METHODS.items() if facts.sharded]
        raise UsageError.for_value("method", method, able, "it cannot run on FSDP2's shards: use ghost_fsdp_bk")
    return module, ranks


def _check_group(group: object) -> None:
    """Refuse what is no process group, or one that this rank is not in."""
    wanted = "a process group that this rank is in, such as torch.distributed.group.WORLD"
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns to ranks outside
        raise UsageError.for_value("process_group", "a group of other ranks", wanted)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise UsageError.for_value("process_group", group, wanted)


def _ranks_of_ddp(model: DistributedDataParallel, group: dist.ProcessGroup | None) -> Ranks:
    """Return DDP's ranks."""
    if group not in (None, model.process_group):
        raise UsageError("process_group: got another group than DistributedDataParallel's own; leave it out")
    if model.static_graph:
        raise UnsupportedModelError(
            "model: DistributedDataParallel(static_graph=True) reduces gradients although it is told not to; "
            "build it without static_graph"
        )
    return Replicas([model.process_group], model)


def _ranks_of(model: nn.Module, group: dist.ProcessGroup | None) -> Ranks:
    """Return the ranks of a model without DDP around it."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "model: DistributedDataParallel lies within it; put DistributedDataParallel around the whole"
        )
    shards = _shards(model)
    if shards is not None:
        if group is not None:
            raise UsageError("process_group: fully_shard's mesh says which ranks train together; leave it out")
        shards.copy_first(model)
        return shards
    if group is None:
        if dist.get_world_size() == 1:
            return Ranks()
        raise UsageError.for_value(
            "process_group",
            None,
            "a process group",
            f"{dist.get_world_size()} ranks run: pass torch.distributed.group.WORLD if they train one model, "
            f"new_group([rank]) if each trains its own",
        )
    if group.size() == 1:
        return Ranks()
    replicas = Replicas([group])
    replicas.copy_first(model)
    return replicas


def _shards(model: nn.Module) -> Replicas | None:
    """Return the ranks of a model that FSDP has sharded; FSDP is not imported for that."""
    if not fsdp_is_loaded():
        return None
    from dit_dp.clipping.fsdp import find_shards

    return find_shards(model)
