"""A model's parameters spread over ranks by FSDP2, block by block."""

from collections.abc import Iterator, Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard every transformer block alone, and the rest as one, in place; scalars, which cannot be cut, stay replicas.

    Args:
        model: On its device, the same on every rank.
        mesh: The ranks.

    Returns:
        The model.
    """
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    return model


def set_trainable(model: nn.Module, trains: Mapping[str, bool]) -> None:
    """Let some parameters take gradients and others not: shards, and the full parameters that stand in for them.

    FSDP2 looks at a shard's `requires_grad` once, when it gathers it first; so what it gathers is told as well. Every
    rank has to call this.

    Args:
        model: Sharded.
        trains: By name; others stay as they are.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.reshard()  # after a forward without gradients the root's are gathered
    _tell(model, trains)
    for group in groups:
        group.unshard()
    _tell(model, trains)
    for group in groups:
        group.reshard()


def _tell(model: nn.Module, trains: Mapping[str, bool]) -> None:
    for name, wanted in trains.items():
        model.get_parameter(name).requires_grad_(wanted)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the model's outermost lists that have parameters."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)
