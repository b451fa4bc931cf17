"""Build what is examined: a workload with its objective and random data, or a case of the user's own."""

import contextlib
import sys

import torch

from dit_dp.clipping.batch import check_losses, trainable_parameters
from dit_dp.errors import UsageError
from dit_dp.models.dit import randomize_zero_init_
from memory_test.core.config import experiment_of
from memory_test.core.custom import build_own, users_code
from memory_test.core.workload import build_data, build_model
from memory_test.doctor.args import DoctorArgs
from memory_test.doctor.case import Case


def build_case(args: DoctorArgs) -> tuple[str, Case]:
    """Return the model's name, with the sizes that differ from the named model's, and the case.

    Raises:
        UsageError: It cannot be had, or is no model with a batch and one loss per example.
    """
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the table
        name, case = _build_custom(args) if args.is_custom else _build_named(args)
        _check(case)
    return name, case


def _build_named(args: DoctorArgs) -> tuple[str, Case]:
    """Build a model whose zero-initialised parameters are made random: at zero most gradients are zero."""
    resolved = experiment_of(args).resolve(device="cpu", num_threads=1)
    model = build_model(resolved)
    randomize_zero_init_(model, torch.Generator().manual_seed(args.seed))
    data = build_data(resolved)
    batch = data.batch(args.batch_size)
    return resolved["model"], Case(model, batch, data.objective, data.row_to_unit(batch))


def _build_custom(args: DoctorArgs) -> tuple[str, Case]:
    own = build_own(str(args.model))
    loss_fn, batch = own.case(args.batch_size)
    return own.spec, Case(own.model, batch, loss_fn)


def _check(case: Case) -> None:
    """Refuse a batch of fewer than two rows, a model that does not train, and a loss that is not one per example."""
    examples = case.num_units
    if examples < 2:
        raise UsageError.for_value("batch", f"{examples} examples", "at least 2", "one example has nobody to depend on")
    trainable_parameters(case.model)
    with users_code("model: its loss"):
        losses = case.loss_fn(case.model, case.batch)
    check_losses(losses, examples)
