"""How far from the best is what `auto` chooses: every plan for a small model, timed in turns in one process.

A plan is ``keep`` or a norm rule for every shape of weight that takes 2 % of the operations or more, and a physical
batch; smaller weights follow `auto`. Where none of these fits a budget, blocks are recomputed: a plan is which,
``keep`` or `auto`'s norm rule for every such shape, and a physical batch. Times are CPU times of the one thread, so
that what else the machine does counts little; rounds are rotated and ratios paired.
"""

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dit_dp.clipping import attach
from dit_dp.clipping.auto import AutoEngine
from dit_dp.clipping.batch import num_rows
from dit_dp.clipping.planner import RULES, Curve, NormRule, Plan, Step
from dit_dp.clipping.units import Units
from memory_test.core.config import ExperimentConfig
from memory_test.core.workload import build_data, build_model, loss_function

Rule = NormRule | Literal["keep"]

ROUNDS = 9
LARGE = 0.02
FINALISTS = 12
"""Plans that are timed to the end; the others drop out after the first rounds."""


@dataclass(frozen=True)
class Found:
    """One budget's result.

    Attributes:
        budget_ratio: Budget over the peak of the plan made without one, for what a step holds beyond its
            parameters and optimizer state.
        num_plans: Plans within the budget, by predicted peak.
        chosen_ms: Median CPU time of `auto`'s plan.
        best_ms: That of the fastest.
        ratio: Median of paired ratios, `auto`'s plan over the fastest, in rounds of their own.
        chosen: `auto`'s plan, in words.
        best: The fastest plan, in words.
    """

    budget_ratio: float | None
    num_plans: int
    chosen_ms: float
    best_ms: float
    ratio: float
    chosen: str
    best: str


class _Subject:
    """A model with its data, on which plans are timed.

    Attributes:
        first: By identity of a plan, its shortest time of two; a plan takes as long whatever the budget.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.resolved = config.resolve(device="cpu", num_threads=1)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = build_model(self.resolved)
        data = build_data(self.resolved)
        self.batch = data.batch(config.batch_size)
        self.loss_fn = loss_function(data, "float32")
        self.row_to_unit = data.row_to_unit(self.batch)
        self.units = Units.of(num_rows(self.batch), self.row_to_unit)
        self.first: dict[int, float] = {}

    def attach(self, budget: int | None) -> AutoEngine:
        """Return an engine that has taken a step, and so has a plan."""
        engine = attach(self.model, "auto", 1.0, memory_budget=budget)
        assert isinstance(engine, AutoEngine)
        engine.accumulate(self.loss_fn, self.batch, self.row_to_unit)
        engine.zero_grad()
        return engine

    def seconds(self, engine: AutoEngine, plan: Plan) -> float:
        """Return the CPU time of one clipped sum by a plan."""
        engine.follow(plan)
        start = time.thread_time()
        engine.accumulate(self.loss_fn, self.batch, self.row_to_unit)
        seconds = time.thread_time() - start
        engine.zero_grad()
        return seconds


def plans_of_rules(step: Step, chosen: Plan) -> Iterator[Plan]:
    """Yield every plan that stores and books all blocks: a rule for each large shape, and every even physical batch."""
    count = len(step.blocks)
    for curve in _curves(step):
        shapes = _large_shapes(curve)
        for rules in itertools.product(RULES, repeat=len(shapes)):
            yield _plan(curve, chosen, shapes, rules, count, count)


def plans_of_recomputing(step: Step, chosen: Plan) -> Iterator[Plan]:
    """Yield every plan that recomputes: how many blocks are booked and stored, what is kept, the physical batch."""
    count = len(step.blocks)
    for curve in _curves(step):
        shapes = _large_shapes(curve)
        rules: list[tuple[Rule, Rule]] = [("keep", chosen.norms.get(names[0], "ghost")) for names in shapes]
        for booked, stored in itertools.product(range(1, count + 1), repeat=2):
            if booked + stored < 2 * count:
                for some in itertools.product(*rules):
                    yield _plan(curve, chosen, shapes, some, booked, stored)


def _curves(step: Step) -> Iterator[Curve]:
    """Yield the memory of every even physical batch."""
    for batch in sorted({-(-step.num_units // parts) for parts in range(1, step.num_units + 1)}):
        yield Curve(step, batch)


def _large_shapes(curve: Curve) -> list[list[str]]:
    """Return the weights of each shape that takes much of the operations."""
    shapes: dict[tuple[int, int, int], list[str]] = {}
    for name, call in curve.weights.items():
        shapes.setdefault((call.positions, call.width, call.out_width), []).append(name)
    work = {shape: math.prod(shape) * len(names) for shape, names in shapes.items()}
    return [names for shape, names in shapes.items() if work[shape] >= LARGE * sum(work.values())]


def _plan(
    curve: Curve, chosen: Plan, shapes: Sequence[Sequence[str]], rules: Sequence[Rule], booked: int, stored: int
) -> Plan:
    """Return the plan of a rule for each of some shapes; the others follow the chosen one."""
    norms, keep = dict(chosen.norms), set(chosen.keep)
    for rule, names in zip(rules, shapes, strict=True):
        keep = keep | set(names) if rule == "keep" else keep - set(names)
        if rule != "keep":
            norms.update(dict.fromkeys(names, rule))
    return Plan(curve.batch, frozenset(keep), norms, booked, stored, curve.peak(keep, booked, stored))


def search(config: ExperimentConfig, budget_ratios: tuple[float | None, ...]) -> list[Found]:
    """Time every plan within each budget and `auto`'s, and compare.

    Args:
        config: A small model; its method is not used.
        budget_ratios: Budgets over the peak of the plan that `auto` makes without one, for what a step holds beyond
            its parameters and optimizer state; `None`: no budget.
    """
    subject = _Subject(config)
    engine = subject.attach(None)
    step = engine.known(subject.batch, subject.units)
    assert engine.plan is not None
    free, plans, found = engine.plan, list(plans_of_rules(step, engine.plan)), []
    leaner = list(plans_of_recomputing(step, engine.plan))
    engine.detach()
    for ratio in budget_ratios:
        dynamic = free.peak_bytes - step.static_bytes
        budget = None if ratio is None else step.static_bytes + int(ratio * dynamic)
        within = [plan for plan in plans if budget is None or plan.peak_bytes <= budget]
        within = within or [plan for plan in leaner if budget is not None and plan.peak_bytes <= budget]
        if not within:
            continue  # no plan fits
        engine = subject.attach(budget)
        found.append(_compare(subject, engine, within, ratio))
        engine.detach()
    return found


def _compare(subject: _Subject, engine: AutoEngine, plans: list[Plan], ratio: float | None) -> Found:
    """Narrow the plans down to the fastest few, then time those and the chosen one in turns."""
    assert engine.plan is not None
    chosen, blocks = engine.plan, len(engine.blocks)
    for plan in plans:
        if id(plan) not in subject.first:
            subject.first[id(plan)] = min(subject.seconds(engine, plan) for _ in range(2))
    finalists = [chosen, *sorted(plans, key=lambda plan: subject.first[id(plan)])[:FINALISTS]]
    times: list[list[float]] = [[] for _ in finalists]
    for turn in range(ROUNDS):
        for index in (*range(turn % len(finalists), len(finalists)), *range(turn % len(finalists))):
            times[index].append(subject.seconds(engine, finalists[index]))
    best = min(range(len(finalists)), key=lambda index: statistics.median(times[index]))
    # the fastest of many was lucky too: the two meet once more
    pairs = [(subject.seconds(engine, chosen), subject.seconds(engine, finalists[best])) for _ in range(ROUNDS)]
    return Found(
        budget_ratio=ratio,
        num_plans=len(plans),
        chosen_ms=1e3 * statistics.median(times[0]),
        best_ms=1e3 * statistics.median(times[best]),
        ratio=statistics.median(a / b for a, b in pairs),
        chosen=_words(chosen, blocks),
        best=_words(finalists[best], blocks),
    )


def _words(plan: Plan, blocks: int) -> str:
    counts = {"keep": len(plan.keep)}
    for name, rule in plan.norms.items():
        if name not in plan.keep:
            counts[rule] = counts.get(rule, 0) + 1
    rules = ", ".join(f"{count} {rule}" for rule, count in counts.items() if count)
    recomputing = "" if plan.booked == plan.stored == blocks else f"; {plan.booked} booked, {plan.stored} stored"
    return f"{plan.physical_batch} at a time; {rules}{recomputing}"
