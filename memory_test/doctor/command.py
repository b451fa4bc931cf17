"""The command: build the case, examine the model and every method, write what was found."""

import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from dit_dp.clipping.batch import trainable_parameters
from memory_test.core import environment, store
from memory_test.doctor.args import OURS, DoctorArgs
from memory_test.doctor.case import Case, Reference
from memory_test.doctor.examine import examine_attachment, examine_method, examine_model
from memory_test.doctor.facts import Diagnosis, Examination
from memory_test.doctor.render import to_json, write_text
from memory_test.doctor.subject import build_case

_PEERS_WARN = ("Full backward hook is firing", "In CPU autocast, but the target dtype is not supported")
"""Opacus's hooks on layers whose inputs take no gradient; its vmap and ExpandedWeights in float64."""


def run_doctor(args: DoctorArgs, out: TextIO | None = None) -> int:
    """Examine what the arguments name and write it.

    Args:
        args: Which model, which methods.
        out: Where to; default: stdout.

    Returns:
        The exit code: 0 if every check passed, 1 if one failed or a method refused the model.

    Raises:
        UsageError: The model cannot be had, or the file cannot be written.
    """
    if args.json is not None:
        store.check_writable(args.json, "json")
    with warnings.catch_warnings():
        for message in _PEERS_WARN:
            warnings.filterwarnings("ignore", message=message)
        examination = examine(*build_case(args), args)
    write_text(examination, out or sys.stdout)
    if args.json is not None:
        store.write_text(args.json, to_json(examination, environment.capture("cpu")))
    return 0 if examination.passed else 1


def examine(name: str, case: Case, args: DoctorArgs) -> Examination:
    """Examine the model, then every method asked for."""
    model, reference = examine_model(case, args.max_grad_norm)
    return Examination(
        model=name,
        num_parameters=sum(parameter.numel() for parameter in trainable_parameters(case.model).values()),
        num_examples=case.num_units,
        max_grad_norm=None if reference is None else reference.max_grad_norm,
        num_clipped=None if reference is None else reference.num_clipped,
        seed=args.seed,
        diagnoses=(model, *_diagnoses(case, args, reference)),
    )


def _diagnoses(case: Case, args: DoctorArgs, reference: Reference | None) -> Iterator[Diagnosis]:
    """Yield what each method's checks found; say on a terminal which one is at work."""
    from rich.console import Console

    console = Console(stderr=True)
    for method in args.methods or OURS:
        with console.status(f"examining {method}"):
            if reference is None:
                yield examine_attachment(case, method)
            else:
                yield examine_method(case, method, reference, args.seed)
