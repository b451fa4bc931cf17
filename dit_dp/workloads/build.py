"""From a workload's specification to its model and its objective."""

from torch import nn

from dit_dp.models import model_class
from dit_dp.objectives import Objective
from dit_dp.workloads.config import WorkloadSpec


def build_model(spec: WorkloadSpec) -> nn.Module:
    """Return the model on the CPU, in training mode, all of its parameters as its class leaves them.

    Raises:
        UsageError: A size that does not fit, or a checkpoint that cannot be loaded.
    """
    return model_class(spec.workload.family)(**spec.arguments).train()


def build_objective(spec: WorkloadSpec) -> Objective:
    """Return what the model is trained on."""
    return Objective(spec.objective)


def input_shape(spec: WorkloadSpec) -> tuple[int, ...]:
    """Return the shape of one unit of data: (C, H, W) for an image, (M, C, H, W) for a set of M."""
    image = (spec.in_channels, spec.latent_size, spec.latent_size)
    size = spec.objective.set_size
    return image if size is None else (size, *image)
