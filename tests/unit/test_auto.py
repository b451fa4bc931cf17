"""`auto`: its predictions against the allocator, its choices under budgets, its refusals; `lean`: its memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.auto import AutoEngine
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.lives import Life, Trial, WeightCall
from dit_dp.clipping.planner import NORM_RULES, Curve, Step, make_plan
from dit_dp.clipping.reference import clipped_sum
from dit_dp.clipping.units import Units
from dit_dp.errors import EngineStateError, UsageError
from dit_dp.models import DiT
from dit_dp.objectives import DDPMObjective
from memory_test.core import breakdown as logs
from memory_test.core.meters import memory_meter
from tests.models import make_case

OBJECTIVE = DDPMObjective(learn_sigma=True, class_dropout_prob=0.1)


def model() -> DiT:
    """Return a DiT whose activations outweigh its parameters: T = 64, width 32, 4 blocks."""
    torch.manual_seed(0)
    return DiT(input_size=16, hidden_size=32, depth=4, num_heads=2, num_classes=5).train()


def draw(num_examples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(num_examples, 4, 16, 16, generator=generator)
    return OBJECTIVE.draw(x0, torch.randint(0, 5, (num_examples,), generator=generator), generator)


def peak_of_a_step(method: str, num_examples: int = 8, **settings: int) -> tuple[int, Engine]:
    """Return the allocator's peak over the second step's clipped sum, parameters and batch included."""
    with memory_meter("cpu") as meter:
        engine = attach(model(), method, **settings)
        batch = draw(num_examples)
        engine.accumulate(OBJECTIVE, batch)
        engine.zero_grad()
        meter.mark(1, "forward")
        engine.accumulate(OBJECTIVE, batch)
        meter.mark(1, "idle")
        engine.zero_grad()
    reading = meter.read()
    peak, _ = logs.peak_within(logs.running_total(reading.log.events), logs.span(reading.log, [1]))
    return peak + reading.baseline, engine


def peaks() -> tuple[int, int]:
    """Return the predicted peaks of the plan without a budget and of the leanest."""
    _, free = peak_of_a_step("auto", optimizer_bytes=0)
    with pytest.raises(UsageError, match="memory_budget: got 1; accepted: >= ") as refused:
        peak_of_a_step("auto", optimizer_bytes=0, memory_budget=1)
    return free.choices()["predicted_peak_bytes"], int(str(refused.value).split(">= ")[1].split()[0])


def test_predicted_peaks_are_the_allocators_and_within_the_budget() -> None:
    """Off by temporaries within operations alone: 3 % of these small steps."""
    free, least = peaks()
    seen = set()
    for share in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0):
        budget = int(least + share * (free - least))
        peak, engine = peak_of_a_step("auto", optimizer_bytes=0, memory_budget=budget)
        choices = engine.choices()
        assert choices["predicted_peak_bytes"] <= budget
        if choices["recomputed_blocks"] == choices["revisited_blocks"] == 0:
            assert peak == pytest.approx(choices["predicted_peak_bytes"], rel=0.03)
        else:  # not counted: 5 KB of random state a block, 2 % of this step
            assert 0.9 * choices["predicted_peak_bytes"] <= peak <= 1.05 * choices["predicted_peak_bytes"]
        seen.add((choices["physical_batch"], choices["recomputed_blocks"] > 0))
    assert (8, False) in seen
    assert {batch for batch, recomputes in seen if not recomputes} - {8}
    assert (1, True) in seen


def test_no_rule_is_slower_than_the_budget_asks() -> None:
    """With few positions keeping takes memory; the small weights, changed first, need not have been in the end."""
    wide = DiT(input_size=16, patch_size=4, hidden_size=64, depth=4, num_heads=2, num_classes=5).train()
    engine = attach(wide, "auto", optimizer_bytes=0)
    assert isinstance(engine, AutoEngine)
    batch = draw(8)
    engine.accumulate(OBJECTIVE, batch)
    step = engine.known(batch, Units.of(8, None))
    blocks = len(step.blocks)
    curve = Curve(step, 8)
    free, least = (curve.peak(names, blocks, blocks) for names in (curve.weights, ()))

    def cost(rule: str, batch: int, call: WeightCall) -> float:
        return 1.0 if rule == "keep" else 1.001 if call.name.endswith("attn.proj.weight") else 2.0

    counts = set()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = int(least + share * (free - least))
        plan = make_plan(step, budget, cost)
        assert plan.physical_batch == 8
        assert plan.peak_bytes <= budget
        for name in curve.weights.keys() - plan.keep:
            assert curve.peak(plan.keep | {name}, blocks, blocks) > budget, name
        counts.add(len(plan.keep))
    assert len(counts) > 1


def test_every_rule_that_a_plan_names_is_followed_and_exact() -> None:
    """By whatever rules, the sum is the oracle's: norms kept, by Gram matrices, by gradients, by tiles."""
    case = make_case("tokens")
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, 1.0)
    engine = attach(case.model, "auto", max_grad_norm=1.0)
    assert isinstance(engine, AutoEngine)
    engine.accumulate(case.loss_fn, case.batch)
    assert engine.plan is not None
    for rule in NORM_RULES:
        engine.zero_grad()
        engine.follow(replace(engine.plan, keep=frozenset(), norms=dict.fromkeys(engine.plan.norms, rule)))
        engine.accumulate(case.loss_fn, case.batch)
        assert engine.choices()["norm_rules"][rule] == len(engine.plan.norms)
        for name, parameter in engine.parameters.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_lean_holds_less_than_one_pass() -> None:
    whole, _ = peak_of_a_step("bookkeeping")
    lean, engine = peak_of_a_step("lean")
    assert engine.choices()["recomputed_blocks"] == 3
    assert lean < 0.6 * whole


def test_a_plan_serves_smaller_batches_and_is_made_again_for_larger() -> None:
    engine = attach(model(), "auto")
    assert isinstance(engine, AutoEngine)
    for size, planned in ((4, 4), (3, 4), (6, 6)):
        engine.accumulate(OBJECTIVE, draw(size))
        engine.zero_grad()
        assert engine.plan is not None
        assert engine.plan.physical_batch == planned


def test_backward_is_refused_where_the_batch_is_taken_in_parts() -> None:
    free, least = peaks()
    engine = attach(model(), "auto", memory_budget=(free + least) // 2, optimizer_bytes=0)
    losses = OBJECTIVE(engine.forward_model, draw(8))
    engine.backward(losses)  # no plan yet
    engine.zero_grad()
    engine.accumulate(OBJECTIVE, draw(8))
    engine.zero_grad()
    with pytest.raises(EngineStateError, match="units at a time to stay within its budget"):
        engine.backward(OBJECTIVE(engine.forward_model, draw(8)))


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_a_budget_is_bytes(budget: object) -> None:
    with pytest.raises(UsageError, match=r"memory_budget: got .*give bytes"):
        attach(nn.Linear(2, 1), "auto", memory_budget=budget)


def test_global_random_state_is_left_alone() -> None:
    case = make_case("tokens")
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    attach(case.model, "auto").accumulate(case.loss_fn, case.batch)
    assert torch.equal(torch.rand(3), wanted)


def test_what_the_first_trial_alone_left_behind_does_not_make_constants_grow() -> None:
    """An objective moves its tables to the device once; weights cast for autocast are the same for any batch."""

    def trial(units: int, *, cache: bool) -> Trial:
        tables = [Life(8000, 1)] if cache else []
        return Trial(units, [Life(100, 0, 9), *tables, Life(1_000_000, 2, 9), Life(500 * units, 3, 9)], end=10)

    step = Step((trial(1, cache=True), trial(2, cache=False)), (), {}, 0, 8)
    assert Curve(step, 8).peak((), 0, 0) == 100 + 1_000_000 + 500 * 8
    later = Step((trial(1, cache=False), trial(2, cache=True)), (), {}, 0, 8)
    assert Curve(later, 8).peak((), 0, 0) == 100 + 8000 + 1_000_000 + 500 * 8
