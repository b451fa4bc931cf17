"""`memory-test plan`: methods side by side in processes of their own, then one recommendation."""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import shlex
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.privacy import noise_multiplier
from dit_dp.workloads import WORKLOADS
from memory_test.core.config import ExperimentConfig
from memory_test.core.store import write_text
from memory_test.plan.args import PlanArgs
from memory_test.plan.facts import Budget, MethodPlan, Plan
from memory_test.plan.render import describe_plan
from memory_test.predict.garbage import collect_rarely
from memory_test.predict.rates import calibration_of
from memory_test.sweep.process import default_threads


def run_plan(args: PlanArgs) -> int:
    """Plan and report; return the exit code.

    Raises:
        UsageError: None of the private methods fits or runs, nor any other where only others were asked for; what was
            found is reported first.
    """
    plan = make_plan(args)
    sys.stdout.write(describe_plan(plan) + "\n")
    if args.json is not None:
        write_text(args.json, json.dumps(dataclasses.asdict(plan), indent=1) + "\n")
        sys.stdout.write(f"plan: {args.json}\n")
    wanted = [row for row in plan.methods if METHODS[row.method].private] or plan.methods
    if not any(row.status == "fits" for row in wanted):
        nearest = min(wanted, key=lambda row: (row.status != "too large", row.peak_reserved_bytes or math.inf))
        if nearest.status == "refused":
            raise UsageError(f"methods: none of them can run; {nearest.method}: {nearest.reason}")
        raise UsageError(f"gpu: nothing fits {args.card.name}; {nearest.method}: {nearest.reason}")
    return 0


def make_plan(args: PlanArgs) -> Plan:
    """Return the plan that the arguments ask for."""
    budget = _budget(args)
    if args.is_custom:
        _check_own(args)
    rows = _relative(_plan_all(args))
    best = recommend(rows)
    return Plan(
        card=dataclasses.asdict(args.card),
        config=_asked(args),
        margin=args.margin,
        methods=rows,
        recommended=None if best is None else best.method,
        command=None if best is None else command(args, best, budget),
        budget=budget,
        calibrated=_calibrated(args),
    )


def _asked(args: PlanArgs) -> dict[str, Any]:
    """Return what was asked for, with the model's label and image size said."""
    cell = args.cell("vanilla", args.batch_size, 1)
    size = None if cell.is_custom else cell.spec.image_size
    return {**cell.as_dict(), "model": cell.model_label, "image_size": size}


def _calibrated(args: PlanArgs) -> str | None:
    found = calibration_of(args.card, args.calibration)
    if found is None:
        return None
    return f"Relative times by a calibration of the card, off by at most {found.worst_error:.0%} on whole steps."


def _budget(args: PlanArgs) -> Budget | None:
    if args.epsilon is None or args.delta is None or args.dataset_size is None or args.steps is None:
        return None
    rate = args.batch_size / args.dataset_size
    sigma = noise_multiplier(target_epsilon=args.epsilon, delta=args.delta, sample_rate=rate, num_steps=args.steps)
    return Budget(epsilon=args.epsilon, delta=args.delta, sample_rate=rate, steps=args.steps, noise_multiplier=sigma)


def _plan_all(args: PlanArgs) -> list[MethodPlan]:
    """Plan every method, as many at a time as there are cores."""
    workers = min(default_threads(), len(args.methods))
    if workers <= 1:
        return [_plan_one(args, method) for method in args.methods]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=collect_rarely) as pool:
            return list(pool.map(functools.partial(_plan_one, args), args.methods))
    except BrokenProcessPool as error:
        raise UsageError("plan: a worker died, perhaps for want of memory; name fewer --methods") from error


def _plan_one(args: PlanArgs, method: str) -> MethodPlan:
    import warnings

    import torch

    from memory_test.plan.search import plan_method
    from memory_test.predict.roofline import rates_of

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rates = rates_of(args.card, args.calibration)
    cell = functools.partial(args.cell, method)
    with contextlib.redirect_stdout(sys.stderr):  # what a callable of the user's prints
        return plan_method(method, cell, args.batch_size, args.card, args.margin, rates)


def _check_own(args: PlanArgs) -> None:
    """Raise `UsageError` if a model of the user's own is wrong, rather than call it a refusal by every method."""
    from memory_test.plan.search import check_own

    with contextlib.redirect_stdout(sys.stderr):
        check_own(args.cell("vanilla", 1, 1), args.card)


def _relative(rows: list[MethodPlan]) -> list[MethodPlan]:
    """Put step times over ordinary training's, if that is among them and fits."""
    base = next((row.step_seconds for row in rows if row.method == "vanilla"), None)
    if not base:
        return rows
    return [
        row if row.step_seconds is None else dataclasses.replace(row, relative_step_time=row.step_seconds / base)
        for row in rows
    ]


def recommend(rows: Iterable[MethodPlan]) -> MethodPlan | None:
    """Return the fastest private method that fits; of equals, the one that leaves most memory."""
    able = [row for row in rows if row.status == "fits" and METHODS[row.method].private]
    return min(able, key=lambda row: (round(row.step_seconds or 0.0, 4), -(row.free_bytes or 0)), default=None)


def command(args: PlanArgs, row: MethodPlan, budget: Budget | None) -> str:
    """Return the command that measures a row on the card it was planned for."""
    in_loop = not row.in_engine
    cell = args.cell(
        row.method,
        row.physical_batch or 1 if in_loop else args.batch_size,
        row.accumulation or 1 if in_loop else 1,
    )
    if row.memory_budget_gib is not None:
        cell = dataclasses.replace(cell, memory_budget_gib=row.memory_budget_gib)
    if budget is not None:
        cell = dataclasses.replace(cell, noise_multiplier=budget.printed_multiplier)
    words = ["memory-test", "run", "--experiment", cell.experiment]
    for field in dataclasses.fields(ExperimentConfig):
        if field.name == "experiment":
            continue
        value = getattr(cell, field.name)
        if field.name == "model":
            value = value or WORKLOADS[cell.workload].model
        elif value == field.default and field.name != "batch_size":
            continue
        flag = "--" + field.name.replace("_", "-")
        words += [flag] if value is True else [flag, *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join([*words, "--device", "cuda"])
