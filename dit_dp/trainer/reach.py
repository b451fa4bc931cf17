"""Whether a gradient reaches what trains first. A model that starts at zero behind it lets none through."""

import logging

import torch
from torch import nn

from dit_dp.objectives import Objective
from dit_dp.training.groups import members
from dit_dp.training.schedule import ALL
from dit_dp.workloads import WorkloadSpec

log = logging.getLogger(__name__)

_NAMED = 3


def warn_of_noise_alone(model: nn.Module, objective: Objective, spec: WorkloadSpec, *, says: bool = True) -> bool:
    """Warn if every gradient of the first phase is exactly zero, so that its steps would release noise alone.

    So it is where an encoder trains before a frozen DiT at its initialisation, which answers zero to anything. The one
    example it is found out with is random: nothing of the data is looked at.

    Args:
        model: Before its first step, with its weights.
        objective: It trains on.
        spec: Of the workload.
        says: Whether this process is the one that warns.

    Returns:
        Whether it is so.
    """
    phase = spec.schedule.phases[0]
    if spec.schedule.lora_rank is not None or ALL in phase.groups:
        return False
    chosen = {name: model.get_parameter(name) for name in members(model, phase.groups)}
    zero = [name for name, p in model.named_parameters() if name not in chosen and not bool(p.any())]
    if not zero:  # weights that were trained: nothing to find, and no step to pay for that
        return False
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    images = () if spec.objective.set_size is None else (spec.objective.set_size,)
    shape = (1, *images, spec.in_channels, spec.latent_size, spec.latent_size)
    x = torch.randn(shape, generator=generator, device=device)
    labels = None if images else torch.zeros(1, dtype=torch.int64, device=device)
    loss = objective(model, objective.draw(x, labels, generator)).sum()
    found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    if any(bool(gradient.any()) for gradient in found if gradient is not None):
        return False
    if says:
        matrices = [name for name in zero if model.get_parameter(name).dim() > 1]
        more = f" and {len(matrices) - _NAMED} more" if len(matrices) > _NAMED else ""
        log.warning(
            "train: %s noise alone: no gradient reaches %s, since frozen weights are zero (%s); "
            "give --weights that were trained, or --train full",
            "every step releases" if phase.end is None else f"steps 1 to {phase.end} release",
            ", ".join(phase.groups),
            ", ".join(matrices[:_NAMED]) + more,
        )
    return True
