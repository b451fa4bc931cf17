"""Trials recompute their blocks: they take less memory than graphs would, and tell what graphs would have held."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_dp.clipping import attach
from dit_dp.clipping.auto import AutoEngine
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.blocks import stand_in
from dit_dp.clipping.lives import Life, Trial, WeightCall
from dit_dp.clipping.planner import Curve, Step
from dit_dp.clipping.probe import Prober
from dit_dp.clipping.reference import clipped_sum
from dit_dp.clipping.unfolded import Visit, unfolded
from dit_dp.clipping.units import Units
from dit_dp.errors import UnsupportedModelError
from dit_dp.models.dit import randomize_zero_init_
from memory_test.core import breakdown as logs
from memory_test.core.meters import memory_meter
from tests.unit.test_auto import OBJECTIVE, draw, model


class Keeping(AutoEngine):
    """Runs its trials with every graph kept."""

    def _new_prober(self) -> Prober:
        prober = super()._new_prober()
        prober._recomputes = False
        return prober


def trial_of(engine: AutoEngine, count: int) -> Trial:
    engine.accumulate(OBJECTIVE, draw(2))  # caches are filled
    engine.zero_grad()
    stand_in(engine.blocks, engine, everywhere=True)
    return engine._run_trial(OBJECTIVE, draw(2), Units.of(2, None), count)


def live_bytes(trial: Trial) -> list[int]:
    changes = [0] * (trial.end + 2)
    for life in trial.lives:
        changes[life.born] += life.num_bytes
        changes[trial.end if life.dies is None else life.dies] -= life.num_bytes
    return list(accumulate(changes))


@pytest.mark.parametrize("count", [1, 2])
def test_an_unfolded_trial_is_the_one_with_graphs(count: int) -> None:
    kept = trial_of(Keeping(randomize_zero_init_(model()), max_grad_norm=1.0), count)
    told = trial_of(AutoEngine(randomize_zero_init_(model()), max_grad_norm=1.0), count)
    assert [life.num_bytes for life in told.lives] == [life.num_bytes for life in kept.lives]
    assert [life.dies is None for life in told.lives] == [life.dies is None for life in kept.lives]
    assert [window[0] for window in told.windows] == [window[0] for window in kept.windows]
    assert (told.leading, told.inputs) == (kept.leading, kept.inputs)
    for ours, theirs in zip(told.weights, kept.weights, strict=True):
        assert (ours.name, ours.positions, ours.operands) == (theirs.name, theirs.positions, theirs.operands)
    assert max(live_bytes(told)) == max(live_bytes(kept))
    at_backward = [live_bytes(trial)[trial.backward] for trial in (told, kept)]
    assert at_backward[0] == at_backward[1]


def test_plans_from_an_unfolded_trial_are_those_from_graphs() -> None:
    curves = []
    for kind in (Keeping, AutoEngine):
        engine = kind(randomize_zero_init_(model()), max_grad_norm=1.0)
        trials = tuple(trial_of(engine, count) for count in (1, 2))
        names = tuple(block.name for block in engine.blocks)
        sizes = {name: 4 * p.numel() for name, p in engine.parameters.items()}
        step = Step(trials=trials, blocks=names, parameter_bytes=sizes, static_bytes=0, num_units=4)
        curve = Curve(step, 4)
        for booked, stored in ((4, 4), (0, 0), (1, 1), (2, 3)):
            for keep in (frozenset[str](), frozenset(sizes)):
                curves.append(curve.peak(keep, booked, stored))
    half = len(curves) // 2
    for told, kept in zip(curves[half:], curves[:half], strict=True):
        assert told == pytest.approx(kept, rel=0.01)


def first_step(method: str, num_examples: int) -> tuple[int, int]:
    """Return the peaks of the first step, trials included, and of the second."""
    with memory_meter("cpu") as meter:
        engine, batch = attach(model(), method), draw(num_examples)
        for step in (1, 2):
            meter.mark(step, "forward")
            engine.accumulate(OBJECTIVE, batch)
            meter.mark(step, "idle")
            engine.zero_grad()
    reading = meter.read()
    total = logs.running_total(reading.log.events)
    first, second = (logs.peak_within(total, logs.span(reading.log, [step]))[0] for step in (1, 2))
    return first, second


def test_the_first_step_of_lean_takes_no_more_than_the_second() -> None:
    first, second = first_step("lean", 2)
    assert first < 1.1 * second
    ordinary, _ = first_step("microbatch", 1)
    assert first < ordinary  # two units recomputed, less than the graph of one


# --- arithmetic -------------------------------------------------------------------------------------------------


def call(index: int, instant: int) -> WeightCall:
    return WeightCall(
        name="w", positions=4, width=2, out_width=2, element_size=4, instant=instant, operands=(index, None)
    )


def test_twins_are_one_storage_and_their_time_is_cut_out() -> None:
    lives = [
        Life(64, 1, None),  # before the block
        Life(8, 2, 4),  # a temporary of the block
        Life(16, 3, 5),  # saved, so dropped in the forward
        Life(32, 6, 20),  # between
        Life(8, 11, 13),  # the same two again
        Life(16, 12, 17),
        Life(4, 16, 19),  # a gradient
    ]
    trial = Trial(1, lives=lives, weights=[call(5, 16)], backward=8, end=21, windows=[("b", 1, 4)])
    trial.inputs["b"] = (0,)
    told = unfolded(trial, [Visit(0, 1, 4), Visit(0, 10, 13)])
    assert told is not None
    assert told.lives == [Life(64, 1, None), Life(8, 2, 4), Life(16, 3, 14), Life(32, 6, 17), Life(4, 13, 16)]
    assert told.weights == [call(2, 13)]
    assert (told.backward, told.end, told.inputs) == (8, 18, {"b": (0,)})


def test_a_forward_that_was_another_is_not_unfolded() -> None:
    lives = [Life(8, 2, 3), Life(8, 3, None), Life(8, 11, 12)]  # the second is a cache
    trial = Trial(1, lives=lives, backward=8, end=21, windows=[("b", 1, 4)])
    assert unfolded(trial, [Visit(0, 1, 4), Visit(0, 10, 13)]) is None
    assert unfolded(trial, [Visit(0, 1, 4)]) is not None  # no gradient reached it


class Caching(nn.Module):
    """A block that fills a cache in its first forward, or makes and saves other tensors every time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.cache: dict[int, Tensor] = {}
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.ones(8).cumsum(0)
        if self.kind == "new tensors":
            self.cache[-self.runs] = torch.ones(self.runs)
        if self.kind == "new graph" and self.runs % 2:
            x = x.sin().asin()
        result: Tensor = x + self.second(torch.tanh(self.first(x))) * self.cache[len(x)]
        return result


@pytest.mark.parametrize("kind", ["once", "new tensors", "new graph"])
def test_caches_do_not_keep_a_model_from_being_tried(kind: str) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(*(Caching(kind) for _ in range(3)))
    x = 0.5 * torch.rand(4, 8)
    engine = attach(chain, "auto")
    norms = engine.accumulate(lambda model, batch: model(batch[0]).square().sum(1), (x,))
    assert norms is not None
    assert engine.choices()["physical_batch"] == 4


# --- blocks that are awkward to recompute -----------------------------------------------------------------------


class Chain(nn.Module):
    """Residual blocks, called in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(Residual() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.kind == "checkpointed":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.kind == "keywords":
                x = block(x, debug=True, early_stop=2.0)
            else:
                h = block(x)
                x += h  # in place, after the call
                x = x.clone()
        return x


class Residual(nn.Module):
    """A block whose first operation does not save its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, *, debug: bool = False, early_stop: float = 1.0) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(early_stop * x)))
        return -y if debug else y


def rows_of(model: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    losses: Tensor = model(x.clone()).square().sum((1, 2))  # type: ignore[union-attr]
    return losses


def chain(kind: str) -> tuple[Chain, tuple[Tensor]]:
    torch.manual_seed(0)
    return Chain(kind), (torch.randn(4, 5, 8),)


@pytest.mark.parametrize("kind", ["checkpointed", "keywords", "in place"])
def test_awkward_blocks_are_clipped_exactly(kind: str) -> None:
    model, batch = chain(kind)
    wanted, norms = clipped_sum(model, rows_of, batch, 1.0)
    engine = attach(model, "auto")
    found = engine.accumulate(rows_of, batch)
    assert found is not None
    torch.testing.assert_close(found.double(), norms, rtol=1e-5, atol=0)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-4, atol=1e-6)


def test_an_input_changed_in_place_cannot_be_recomputed() -> None:
    model, batch = chain("in place")
    with pytest.raises(UnsupportedModelError, match=r"^model: an input of block blocks\.\d is changed in place after"):
        attach(model, "lean").accumulate(rows_of, batch)


def test_what_a_model_checkpoints_itself_is_not_held() -> None:
    peaks = []
    for kind in (AutoEngine, Keeping):
        model, batch = chain("checkpointed")
        engine = kind(model, max_grad_norm=1.0)
        engine.accumulate(rows_of, batch)
        engine.zero_grad()
        stand_in(engine.blocks, engine, everywhere=True)
        peaks.append(max(live_bytes(engine._run_trial(rows_of, batch, Units.of(4, None), 2))))
    assert peaks[0] == peaks[1]
