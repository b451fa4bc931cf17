"""Ranks whose parameters FSDP2 (`torch.distributed.fsdp.fully_shard`) holds in shards.

FSDP2 reduces what autograd leaves in `.grad`, by averaging, and frees a layer's weights when its backward ends, before
clip factors exist. Layers under watch leave nothing there, so that it has nothing to reduce; clipped sums are formed
at full shape, one parameter at a time, and reduce-scattered here by summing.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dit_dp.clipping.gathered import reshard, sharded_modules
from dit_dp.clipping.ranks import Replicas
from dit_dp.errors import UnsupportedModelError


class Shards(Replicas):
    """The ranks of FSDP2's mesh: one dimension of shards, or replicas by shards.

    **Guarantees**: noise is drawn at full shape on every rank and cut, so that it is bit for bit the noise of one rank
    with the same generator, however many ranks there are. **Edge cases**: shards of unequal size, or empty; parameters
    that FSDP2 was told to ignore are replicas.
    """

    in_step = True

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__([mesh.get_group(dim) for dim in range(mesh.ndim)])

    def all_agree(self, yes: bool) -> bool:
        """Ask every rank."""
        return all(self.gather(yes))

    def same(self, parameter: Tensor, attached: Tensor | None) -> bool:
        """Also accept the full parameter by which FSDP2 replaces a shard between a group's forward and backward."""
        gathered = isinstance(attached, DTensor) and not isinstance(parameter, DTensor)
        return gathered or parameter is attached

    def share(self, parameter: nn.Parameter, total: Tensor) -> Tensor:
        """Reduce-scatter by summing; return this rank's shard, a DTensor."""
        if not isinstance(parameter, DTensor):
            return total
        return _placed(total, parameter, Partial())

    def noise(self, parameter: nn.Parameter, std: float, generator: torch.Generator) -> Tensor:
        """Draw at full shape, keep the shard; nothing is sent."""
        if not isinstance(parameter, DTensor):
            return super().noise(parameter, std, generator)
        local = parameter.to_local()
        full = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        return _placed(full.normal_(0.0, std, generator=generator), parameter, Replicate())

    def _start_sum(self, parameter: nn.Parameter) -> torch.distributed.Work | None:
        """Sum what FSDP2 ignores; shards were summed as they were shared."""
        return None if isinstance(parameter, DTensor) else super()._start_sum(parameter)


def _placed(full: Tensor, parameter: DTensor, placement: Placement) -> DTensor:
    """Return a full-shape tensor, held by each rank in the given sense, placed as the parameter is."""
    mesh = parameter.device_mesh
    return DTensor.from_local(full, mesh, [placement] * mesh.ndim, run_check=False).redistribute(
        placements=parameter.placements
    )


def find_shards(model: nn.Module) -> Shards | None:
    """Return the ranks over which FSDP2 has spread a model, or `None` if no parameter is sharded.

    Raises:
        UnsupportedModelError: Parameters are distributed in another way: tensor parallelism, several meshes, CPU
            offload, FSDP1.
    """
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UnsupportedModelError("model: FullyShardedDataParallel is FSDP1; use fully_shard, which is FSDP2")
    reshard(model)  # a forward without gradients, such as sampling, leaves the root's parameters gathered
    parameters = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if not parameters:
        return None
    managed = {p for module in sharded_modules(model) for p in module.parameters()}
    mesh = next(iter(parameters.values())).device_mesh
    for name, parameter in parameters.items():
        kinds = [type(placement) for placement in parameter.placements]
        if parameter not in managed or kinds not in ([Shard], [Replicate, Shard]):
            raise UnsupportedModelError(
                f"model: parameter {name} is distributed as {parameter.placements}; accepted: shards of one mesh "
                f"dimension, replicated over another at most, as fully_shard makes them; take out tensor parallelism"
            )
        if parameter.device_mesh != mesh:
            raise UnsupportedModelError(
                f"model: parameter {name} lies on another mesh than the first; give every fully_shard the same mesh"
            )
        if parameter.device.type != mesh.device_type:
            raise UnsupportedModelError(
                f"model: parameter {name} is offloaded to the {parameter.device.type}; "
                f"call fully_shard without CPUOffloadPolicy"
            )
    return Shards(mesh)
