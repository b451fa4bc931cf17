"""A model as it is sampled from: in evaluation mode, with its averages in place of what trains."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dit_dp.clipping.gathered import reshard, root_gathered
from dit_dp.errors import UsageError


@contextmanager
def evaluating(model: nn.Module, averages: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
    """Put a model in evaluation mode, with averaged weights; afterwards everything is as it was, bit for bit.

    Weights are copied, not exchanged, so that what holds on to them (optimizers, compiled graphs, shards) does not
    notice. This takes the memory of the averaged parameters once more while it lasts.

    Args:
        model: Any; also one with an engine attached.
        averages: By parameter name, in any dtype, such as `Ema`'s; parameters without one stay. `None`: all stay.

    Yields:
        The model.

    Raises:
        UsageError: An average of no parameter, or of another shape.
    """
    reshard(model)  # averages are of the shards
    parameters = dict(model.named_parameters(remove_duplicate=False))
    averages = averages or {}
    for name, average in averages.items():
        if name not in parameters:
            raise UsageError.for_value("ema", name, "names of the model's parameters")
        if average.shape != parameters[name].shape:
            accepted = f"shape {tuple(parameters[name].shape)} for {name}"
            raise UsageError.for_value("ema", tuple(average.shape), accepted)
    modes = [(module, module.training) for module in model.modules()]
    kept = {name: parameters[name].detach().clone() for name in averages}
    try:
        _copy(averages, parameters)
        model.eval()
        with root_gathered(model):
            yield model
    finally:
        _copy(kept, parameters)
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Write values into parameters of these names."""
    for name, value in values.items():
        parameters[name].copy_(value)
