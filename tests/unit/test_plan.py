"""Plans: the largest batch really is, what does not fit says by how much, one private method is recommended."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from dit_dp.console import parse
from dit_dp.errors import UsageError
from memory_test.core.units import MIB
from memory_test.plan.args import PlanArgs
from memory_test.plan.command import command, recommend
from memory_test.plan.facts import Budget, MethodPlan
from memory_test.plan.recipe import with_recipe
from memory_test.plan.search import plan_method
from memory_test.predict.allocator import OutOfMemoryError
from memory_test.predict.cards import find_card
from memory_test.predict.predict import imagined_run, predict_memory
from memory_test.predict.roofline import Rates

SMALL: dict[str, Any] = {
    "model": "DiT-S/2",
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 2,
    "gpu": "custom:memory=0.5,sms=20,context=128",
    "batch_size": 300,
}


def planned(method: str, **changes: Any) -> MethodPlan:
    args = PlanArgs(**{**SMALL, **changes})
    return plan_method(
        method, functools.partial(args.cell, method), args.batch_size, args.card, args.margin, Rates.ceilings(args.card)
    )


def fits(args: PlanArgs, method: str, batch: int) -> bool:
    """Trace this very batch on the card."""
    card = args.card
    config = args.cell(method, batch, 2)
    try:
        predict_memory(imagined_run(config.resolve(device="cuda", num_threads=1), card), card, limited=True)
    except OutOfMemoryError:
        return False
    return True


@pytest.mark.parametrize("method", ["vanilla", "bookkeeping"])
def test_the_largest_batch_is_the_largest(method: str) -> None:
    args = PlanArgs(**{**SMALL, "margin": 0.0, "batch_size": 4093})  # a prime: parts are not rounded down much
    row = planned(method, margin=0.0, batch_size=4093)
    assert row.status == "fits"
    assert row.physical_batch is not None
    assert row.accumulation is not None
    assert row.physical_batch * row.accumulation >= 4093 > row.physical_batch * (row.accumulation - 1)
    assert fits(args, method, row.physical_batch)
    assert not fits(args, method, -(-4093 // (row.accumulation - 1))), "one part fewer would do"
    assert row.free_bytes is not None
    assert 0 <= row.free_bytes < 128 * MIB


TIGHT = [
    ("vanilla", 4, 0.45),
    ("ghost", 4, 0.45),
    ("vanilla", 300, 0.5),
    ("auto", 300, 1.0),
    ("microbatch", 7, 0.5),
]


@pytest.mark.parametrize(("method", "logical", "gib"), TIGHT)
def test_what_the_command_runs_fits_with_the_margin(method: str, logical: int, gib: float) -> None:
    """The command's very cell, imagined on the card less its margin."""
    from dit_dp.console import parse
    from memory_test.cli import RunArgs

    wide: dict[str, Any] = {"hidden_size": 512, "num_heads": 8, "depth": 2} if logical == 4 else {}
    args = PlanArgs(**{**SMALL, **wide, "batch_size": logical, "margin": 0.2, "gpu": f"custom:memory={gib},context=64"})
    row = plan_method(
        method, functools.partial(args.cell, method), logical, args.card, args.margin, Rates.ceilings(args.card)
    )
    assert row.status == "fits", row.reason
    config = parse(RunArgs, command(args, row, None).split()[2:]).config
    assert config.batch_size * config.accumulation >= logical
    room = replace(args.card, memory_bytes=int(0.8 * args.card.memory_bytes))
    run = imagined_run(config.resolve(device="cuda", num_threads=1), room)
    found = predict_memory(run, room, limited=True).repeat
    assert found.peak_reserved_bytes is not None
    assert found.peak_reserved_bytes <= room.usable_bytes


def test_methods_that_part_the_batch_themselves_take_it_whole() -> None:
    micro, auto = planned("microbatch"), planned("auto")
    assert (micro.physical_batch, micro.accumulation, micro.in_engine) == (1, 300, True)
    assert auto.in_engine
    assert auto.physical_batch == auto.choices["physical_batch"] < 300
    assert auto.memory_budget_gib is not None, "by its own budget fragments leave it too little"


def test_a_small_logical_batch_is_taken_at_once() -> None:
    row = planned("ghost", batch_size=3)
    assert (row.physical_batch, row.accumulation) == (3, 1)


def test_what_does_not_fit_says_by_how_much_and_what_would_do() -> None:
    row = planned("vanilla", gpu="custom:memory=0.13,sms=20,context=128")
    assert row.status == "too large"
    assert row.reason is not None
    assert "more than there is; a card of " in row.reason


def test_a_method_that_cannot_run_so_is_a_row_with_its_reason() -> None:
    row = planned("opacus", activation_checkpointing=True)
    assert row.status == "refused"
    assert row.reason is not None
    assert row.reason.startswith("activation_checkpointing: got True")


def a_row(method: str, seconds: float, free: int = 0, **changes: Any) -> MethodPlan:
    facts: dict[str, Any] = {"status": "fits", "physical_batch": 8, "accumulation": 4, "step_seconds": seconds}
    return MethodPlan(method=method, free_bytes=free, **{**facts, **changes})


def test_the_fastest_private_method_is_recommended() -> None:
    rows = [a_row("vanilla", 1), a_row("ghost", 2), a_row("auto", 1.1), a_row("bookkeeping", 1.1, 5)]
    best = recommend([*rows, a_row("lean", 0.5, status="too large")])
    assert best is not None
    assert best.method == "bookkeeping"
    assert recommend([a_row("vanilla", 1)]) is None


def test_the_command_is_one_that_run_takes() -> None:
    from dit_dp.console import parse
    from memory_test.cli import RunArgs

    args = PlanArgs(**{**SMALL, "dtype": "bf16", "ema": True})
    budget = Budget(epsilon=8.0, delta=1e-6, sample_rate=0.1, steps=10, noise_multiplier=1.23456)
    for row, sizes in ((a_row("ghost", 1), (8, 4)), (a_row("auto", 1, in_engine=True), (300, 1))):
        words = command(args, row, budget).split()
        assert words[:2] == ["memory-test", "run"]
        config = parse(RunArgs, words[2:]).config
        assert (config.experiment, config.batch_size, config.accumulation) == (row.method, *sizes)
        assert (config.depth, config.dtype, config.ema, config.noise_multiplier) == (1, "bf16", True, 1.2346)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"gpu": "H1000"}, "gpu: got 'H1000'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"methods": ("ghots",)}, "methods: got 'ghots'"),
        ({"methods": ("ghost", "ghost")}, "methods: got 'ghost ghost'"),
        ({"methods": ()}, "methods: got ''"),
        ({"margin": 1.0}, "margin: got 1.0"),
        ({"epsilon": 8.0}, "delta: got None"),
        ({"epsilon": 8.0, "delta": 1e-6, "dataset_size": 10, "steps": 5}, "batch_size: got 300; accepted: <= 10"),
        ({"epsilon": 0.0, "delta": 1e-6, "dataset_size": 1000, "steps": 5}, "epsilon: got 0.0"),
        ({"epsilon": 8.0, "delta": 1.0, "dataset_size": 1000, "steps": 5}, "delta: got 1.0"),
        ({"model": "DiT-Q/2"}, "model: got 'DiT-Q/2'"),
    ],
)
def test_mistakes_are_refused_in_one_line(changes: dict[str, Any], start: str) -> None:
    with pytest.raises(UsageError) as raised:
        PlanArgs(**{**SMALL, **changes})
    assert str(raised.value).startswith(start)
    assert "\n" not in str(raised.value)


def test_a_size_is_a_card() -> None:
    assert find_card("24GB").name == "24GB (as A10G-24GB)"


def test_a_recipe_becomes_a_plans_options() -> None:
    args = parse(PlanArgs, with_recipe(["--recipe", "ddt_dummy", "--gpu", "24GB", "--batch-size", "4"]))
    assert (args.workload, args.model, args.batch_size, args.ema) == ("ddt", "DDT-S", 4, True)
    assert (args.epsilon, args.delta, args.dataset_size, args.steps) == (8.0, 1e-5, 64, 4)


def test_a_recipe_on_a_folder_needs_the_size_of_its_data() -> None:
    with pytest.raises(UsageError, match="dataset_size: got None"):
        with_recipe(["--recipe", "x2_finetune"])
    args = parse(PlanArgs, with_recipe(["--recipe", "x2_finetune", "--dataset-size", "1000"]))
    assert (args.workload, args.steps) == ("x2", 391)
