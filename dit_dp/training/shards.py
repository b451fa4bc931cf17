"""A model's parameters spread over ranks by FSDP2, block by block."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


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


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the model's outermost lists that have parameters."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)
