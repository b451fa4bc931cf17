"""A model's parameters spread over ranks by FSDP2, block by block."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dit_dp.errors import UnsupportedModelError


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard every transformer block alone, and the rest as one, in place.

    Args:
        model: On its device.
        mesh: The ranks.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: A parameter without dimensions, which FSDP2 cannot cut.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise UnsupportedModelError(
                f"model: parameter {name} is a scalar, which FSDP2 cannot cut; train with DistributedDataParallel"
            )
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the model's outermost lists that have parameters."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)
