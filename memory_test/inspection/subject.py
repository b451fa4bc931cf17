"""Build what is inspected: a workload's model without memory, a pretrained one, or a model of the user's own."""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_dp.errors import UsageError
from dit_dp.workloads import WorkloadSpec
from memory_test.core.config import experiment_of
from memory_test.core.custom import call_target, load_target
from memory_test.core.workload import build_model, spec_of
from memory_test.inspection.args import InspectArgs
from memory_test.inspection.facts import Sizes

PROBE_EXAMPLES = 2
Inputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model and what it can be called with.

    Attributes:
        name: As asked for, with the sizes that differ from the named model's.
        model: In training mode if ours; as it came if the user's.
        inputs: Positional or keyword arguments of one forward pass; `None` if unknown.
        on_meta: Whether the pass can run on the meta device: shapes without values, memory or work.
        sizes: Of a workload's model.
    """

    name: str
    model: nn.Module
    inputs: Inputs | None
    on_meta: bool = False
    sizes: Sizes | None = None


def build_subject(args: InspectArgs) -> Subject:
    """Build the model that the arguments name.

    Raises:
        UsageError: It cannot be had; one line with the cause.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be a JSON document
        return _build_custom(str(args.model)) if args.is_custom else _build_named(args)


def _build_named(args: InspectArgs) -> Subject:
    resolved = experiment_of(args).resolve(device="cpu", num_threads=1)
    if args.pretrained:
        model = build_model(resolved)
    else:
        with torch.device("meta"):
            model = build_model(resolved)
    patch = int(getattr(model, "patch_size", resolved["patch_size"]))
    latent = resolved["latent_size"]
    sizes = Sizes(
        image_size=resolved["image_size"],
        in_channels=resolved["in_channels"],
        latent_size=latent,
        patch_size=patch,
        num_tokens=(latent // patch) ** 2,
    )
    return Subject(resolved["model"], model, _inputs(spec_of(resolved)), on_meta=True, sizes=sizes)


def _inputs(spec: WorkloadSpec) -> Inputs:
    """Return what the model of two units is called with, on the meta device: x, t, and labels or the other images."""
    objective, n = spec.objective, PROBE_EXAMPLES * spec.objective.rows_per_unit
    with torch.device("meta"):
        image = torch.empty(n, spec.in_channels, spec.latent_size, spec.latent_size)
        made = {"x": image, "t": torch.empty(n, dtype=torch.int64 if objective.is_ddpm else torch.float32)}
        if objective.set_size is not None:
            made["images"] = torch.empty_like(image)
        else:
            made["y"] = torch.empty(n, dtype=torch.int64)
        if objective.set_size is None and objective.class_dropout_prob is not None:
            made["drop_labels"] = torch.empty(n, dtype=torch.bool)
        if objective.context_shape is not None:
            made["context_noise"] = torch.empty(n, *objective.context_shape)
    return made


def _build_custom(spec: str) -> Subject:
    target = load_target(spec)
    if isinstance(target, nn.Module):
        return Subject(spec, target, None)
    return _subject_of(spec, call_target(spec, target))


def _subject_of(spec: str, made: Any) -> Subject:
    """Check what the callable returned."""
    accepted = (
        "an nn.Module, (nn.Module, inputs) with inputs a tuple or dict of tensors, or (nn.Module, loss_fn, batch)"
    )
    if isinstance(made, tuple) and len(made) == 3:  # what other commands take: a loss and a batch are no inputs
        made = made[0]
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: {spec}() returned {type(model).__name__}; accepted: {accepted}")
    if inputs is not None and not isinstance(inputs, (tuple, Mapping)):
        raise UsageError(f"model: {spec}() returned inputs as {type(inputs).__name__}; accepted: {accepted}")
    return Subject(spec, model, inputs)
