"""Build what is examined: a DiT with its objective and random data, or a case of the user's own."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn, check_losses, num_rows, trainable_parameters
from dit_dp.errors import UsageError
from dit_dp.models.dit import randomize_zero_init_
from memory_test.core.workload import build_data, build_model
from memory_test.doctor.args import DoctorArgs
from memory_test.doctor.case import Case
from memory_test.inspection.subject import call_target, load_target, users_code

_ACCEPTED = (
    "(model, loss_fn, batch) with batch a tuple or dict of tensors, or a model whose make_batch(num_examples) "
    "returns (loss_fn, batch)"
)


def build_case(args: DoctorArgs) -> tuple[str, Case]:
    """Return the model's name, with the sizes that differ from the named model's, and the case.

    Raises:
        UsageError: It cannot be had, or is no model with a batch and one loss per example.
    """
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the table
        name, case = _build_custom(args) if args.is_custom else _build_dit(args)
        _check(case)
    return name, case


def _build_dit(args: DoctorArgs) -> tuple[str, Case]:
    """Build a DiT whose zero-initialised parameters are made random: at zero most gradients are zero."""
    resolved = args.experiment().resolve(device="cpu", num_threads=1)
    model = build_model(resolved)
    randomize_zero_init_(model, torch.Generator().manual_seed(args.seed))
    data = build_data(resolved)
    return resolved["model"], Case(model, data.batch(args.batch_size), data.objective)


def _build_custom(args: DoctorArgs) -> tuple[str, Case]:
    spec = args.model
    made = call_target(spec, load_target(spec))
    if isinstance(made, tuple) and len(made) == 3:
        return spec, _case_of(spec, *made)
    if isinstance(made, nn.Module) and callable(getattr(made, "make_batch", None)):
        with users_code(f"model: {spec}().make_batch({args.batch_size})"):
            own: Any = made.make_batch(args.batch_size)  # type: ignore[operator]
        if isinstance(own, tuple) and len(own) == 2:
            return spec, _case_of(spec, made, *own)
        raise UsageError.for_value("model", f"{spec}().make_batch: {type(own).__name__}", _ACCEPTED)
    raise UsageError.for_value("model", f"{spec}(): {type(made).__name__}", _ACCEPTED)


def _case_of(spec: str, model: object, loss_fn: LossFn, batch: Batch) -> Case:
    """Check the types of what the user's callable returned."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch
    is_batch = isinstance(batch, (tuple, Mapping)) and all(isinstance(tensor, Tensor) for tensor in tensors)
    if not isinstance(model, nn.Module) or not callable(loss_fn) or not is_batch:
        got = ", ".join(type(part).__name__ for part in (model, loss_fn, batch))
        raise UsageError.for_value("model", f"{spec}: ({got})", _ACCEPTED)
    return Case(model, batch, loss_fn)


def _check(case: Case) -> None:
    """Refuse a batch of fewer than two rows, a model that does not train, and a loss that is not one per example."""
    examples = num_rows(case.batch)
    if examples < 2:
        raise UsageError.for_value("batch", f"{examples} rows", "at least 2", "one example has nobody to depend on")
    trainable_parameters(case.model)
    with users_code("model: its loss"):
        losses = case.loss_fn(case.model, case.batch)
    check_losses(losses, examples)
