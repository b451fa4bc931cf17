"""How exact a method is on a configuration: its clipped sum against the float64 loop over examples.

The model's zero initialisation is replaced by random values, or most gradients would be zero. Weights and batch follow
from the configuration's seed, so that every method sees those of the oracle, which is computed once and left in a file.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from dit_dp.models.dit import randomize_zero_init_
from memory_test.core.workload import Data, build, engine_options, loss_function


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What the float64 loop found.

    Attributes:
        max_grad_norm: C, the median of the norms: about half of the examples are clipped.
        norms: Per-unit gradient norms before clipping.
    """

    max_grad_norm: float
    norms: list[float]


def write_oracle(resolved: dict[str, Any], path: Path) -> Oracle:
    """Compute the clipped sum of a configuration's first batch in float64 and save it as safetensors.

    Args:
        resolved: From `ExperimentConfig.resolve`. Its dtype plays no part, and its method only where that does not
            clip the whole gradient.
        path: File to write: the sum by parameter name, and `Oracle` as metadata.
    """
    torch.set_num_threads(resolved["num_threads"])
    model, data, batch = _subject(resolved)
    groups = _groups(model, resolved["experiment"])
    units = data.row_to_unit(batch)
    _, norms = clipped_sum(model, data.objective, batch, 1.0, units)
    found = Oracle(max_grad_norm=median(norms.tolist()), norms=norms.tolist())
    total, _ = clipped_sum(model, data.objective, batch, found.max_grad_norm, units, groups)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in total.items()}
    save_file(tensors, path, metadata={"oracle": json.dumps(vars(found))})
    return found


def gradient_error(resolved: dict[str, Any], oracle: Path, on_progress: Callable[[str], None]) -> float:
    """Return ``|sum - oracle| / |oracle|`` over all trainable parameters, norms in float64.

    Args:
        resolved: From `ExperimentConfig.resolve`; a private method.
        oracle: From `write_oracle` of the same configuration; of any method that clips as this one does.
        on_progress: Told of every phase.

    Raises:
        FloatingPointError: The method's sum is not finite.
    """
    torch.set_num_threads(resolved["num_threads"])
    model, data, batch = _subject(resolved)
    with safe_open(oracle, framework="pt", device=resolved["device"]) as file:
        threshold = json.loads(file.metadata()["oracle"])["max_grad_norm"]
        engine = attach(
            model,
            resolved["experiment"],
            threshold,
            on_phase=lambda phase: on_progress(f"gradient error: {phase}"),
            **engine_options(resolved),
        )
        engine.accumulate(loss_function(data, resolved["dtype"]), batch, data.row_to_unit(batch))
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        off, size = 0.0, 0.0
        for name, parameter in engine.parameters.items():
            wanted = file.get_tensor(name)
            assert parameter.grad is not None
            off += float((parameter.grad.double() - wanted).square().sum())
            size += float(wanted.square().sum())
    if not math.isfinite(off):
        raise FloatingPointError("the clipped sum is not finite, where the float64 loop's is")
    return float((off / size) ** 0.5)


def _groups(model: nn.Module, method: str) -> list[list[str]] | None:
    """Return the parameter names that a method clips together; `None` where it clips the whole gradient."""
    if METHODS[method].flat:
        return None
    engine = attach(model, method)
    engine.detach()
    return engine.groups


def _subject(resolved: dict[str, Any]) -> tuple[nn.Module, Data, Batch]:
    """Return the model with random weights throughout, the data and the first batch."""
    torch.manual_seed(resolved["seed"])
    workload = build(resolved)
    model = workload.model
    randomize_zero_init_(model, torch.Generator().manual_seed(resolved["seed"]))
    data = workload.make_data(resolved["device"])
    return model.to(resolved["device"]), data, data.batch(resolved["batch_size"])
