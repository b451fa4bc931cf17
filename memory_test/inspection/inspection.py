"""Inspect a model: what it is made of, what trains, and which method can run on it."""

import sys
from collections.abc import Iterable
from typing import TextIO

from torch import nn

from memory_test.inspection.args import InspectArgs
from memory_test.inspection.facts import Inspection, LayerType, ModuleFacts, ParameterFacts
from memory_test.inspection.fixes import validator_errors
from memory_test.inspection.methods import judge_methods, trains
from memory_test.inspection.probe import Probe, run_probe
from memory_test.inspection.render import render_json, render_text
from memory_test.inspection.subject import Subject, build_subject


def run_inspect(args: InspectArgs, out: TextIO | None = None) -> int:
    """Inspect what the arguments name and write it.

    Args:
        args: Which model, and text or JSON.
        out: Where to; default: stdout.

    Returns:
        The exit code, 0: a model that no method supports is a finding, not a failure.

    Raises:
        UsageError: The model cannot be had.
    """
    inspection = inspect_model(build_subject(args))
    text = render_json(inspection) if args.json else render_text(inspection, max_depth=args.max_depth)
    (out or sys.stdout).write(text)
    return 0


def inspect_model(subject: Subject) -> Inspection:
    """Run the probe and collect everything; imports opacus."""
    model, probe = subject.model, run_probe(subject)
    parameters = dict(model.named_parameters())
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    return Inspection(
        model=subject.name,
        sizes=subject.sizes,
        total_parameters=total,
        trainable_parameters=trainable,
        parameter_bytes_float32=4 * total,
        frozen=tuple(name for name, p in parameters.items() if not p.requires_grad),
        num_examples=probe.num_examples,
        shapes_unknown=probe.failure,
        modules=tuple(_module_facts(model, probe)),
        layer_types=_layer_types(model, trainable),
        methods=judge_methods(model, probe),
        validator_errors=validator_errors(model),
    )


def _module_facts(model: nn.Module, probe: Probe) -> Iterable[ModuleFacts]:
    """Yield every module once, with the parameters that it is the first to hold counted."""
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        fresh = set(own.values()) - seen
        seen |= fresh
        yield ModuleFacts(
            name=name,
            type=type(module).__name__,
            parameters=tuple(
                ParameterFacts(name=key, shape=tuple(p.shape), trainable=p.requires_grad) for key, p in own.items()
            ),
            num_parameters=sum(p.numel() for p in fresh),
            calls=probe.calls.get(name, ()),
        )


def _layer_types(model: nn.Module, trainable: int) -> tuple[LayerType, ...]:
    """Count layers and their trainable parameters by type, largest first; a tied parameter counts once."""
    layers: dict[str, int] = {}
    sizes: dict[str, int] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if trains(module):
            kind = type(module).__name__
            fresh = {p for p in module.parameters(recurse=False) if p.requires_grad} - seen
            seen |= fresh
            layers[kind] = layers.get(kind, 0) + 1
            sizes[kind] = sizes.get(kind, 0) + sum(p.numel() for p in fresh)
    return tuple(
        LayerType(type=kind, layers=layers[kind], parameters=size, share=size / trainable)
        for kind, size in sorted(sizes.items(), key=lambda item: -item[1])
    )
