"""What is alike is traced once: any batch from two, norms of the same shapes, a loop from three rounds."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from memory_test.core.breakdown import Tag
from memory_test.core.config import ExperimentConfig
from memory_test.predict.affine import AffineRun
from memory_test.predict.cards import CARDS
from memory_test.predict.predict import Imagined, imagined_run, predict_memory
from memory_test.predict.replay import Place
from memory_test.predict.settings import AllocatorSettings
from memory_test.predict.steady import with_another_step
from memory_test.predict.trace import Storage, Trace
from memory_test.predict.tracer import Tracer

H100 = CARDS["H100-80GB"]
SMALL: dict[str, Any] = {"model": "DiT-S/2", "depth": 1, "hidden_size": 64, "num_heads": 2, "accumulation": 2}
CASES = [("vanilla", "bf16"), ("bookkeeping", "bf16"), ("lean", "float32"), ("opacus", "float32")]


def imagined(batch: int, *, steps: int = 2, whole: bool = False, **changes: Any) -> Imagined:
    config = ExperimentConfig(**{"experiment": "vanilla", **SMALL, **changes, "batch_size": batch})
    return imagined_run(config.resolve(device="cuda", num_threads=1), H100, steps, whole=whole)


def peaks(run: Imagined, **settings: Any) -> dict[str, Any]:
    repeat = predict_memory(run, H100, settings=AllocatorSettings(**settings)).repeat
    return {
        "allocated": repeat.peak_allocated_bytes,
        "reserved": repeat.peak_reserved_bytes,
        "breakdown": repeat.breakdown_bytes,
        "phases": {name: phase.peak_allocated_bytes for name, phase in repeat.phases.items()},
    }


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_two_runs_give_any_other_to_the_byte(method: str, dtype: str) -> None:
    family = AffineRun.of(
        (imagined(4, experiment=method, dtype=dtype), imagined(8, experiment=method, dtype=dtype)), (4, 8)
    )
    assert family is not None
    direct, between = imagined(20, experiment=method, dtype=dtype), family.at(20)
    assert peaks(between) == peaks(direct)
    assert [op.flops for op in between.trace.operations] == [op.flops for op in direct.trace.operations]


def test_runs_of_other_events_span_no_family() -> None:
    assert AffineRun.of((imagined(4), imagined(8, experiment="bookkeeping")), (4, 8)) is None


@contextlib.contextmanager
def nothing_alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace every round and every norm."""
    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "rounds", lambda self, count: range(count))
        patch.setattr(Tracer, "apply", lambda self, function, args: function(*args))
        yield


@pytest.mark.parametrize("method", ["ghost", "microbatch", "auto"])
def test_what_is_traced_once_is_as_if_traced_each_time(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"experiment": method, "accumulation": 1}
    if method == "auto":
        changes["memory_budget_gib"] = 0.03  # five at a time, then the rest
    short = imagined(23, **changes)
    with nothing_alike(monkeypatch):
        whole = imagined(23, **changes)
    assert len(short.trace.operations) <= len(whole.trace.operations)
    for name, got in peaks(short).items():
        wanted = peaks(whole)[name]
        if isinstance(wanted, int):
            assert got == pytest.approx(wanted, rel=2e-4), name  # norms of the rounds left out: 512 bytes each
    counted, every = (sum(op.count * op.flops for op in run.trace.operations) for run in (short, whole))
    assert counted == pytest.approx(every, rel=0.02)


@pytest.mark.parametrize("method", ["bookkeeping", "lean"])
def test_the_look_for_coupled_examples_is_as_if_traced_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = imagined(3, experiment=method, whole=True, dtype="bf16")
    with nothing_alike(monkeypatch):
        whole = imagined(3, experiment=method, whole=True, dtype="bf16")
    assert replace(short, parts=()) == replace(whole, parts=())  # which part of the model is tried is not told again


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_later_steps_are_as_if_traced(method: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = imagined(3, steps=4, experiment=method, dtype=dtype, ema=True)
    monkeypatch.setattr(Imagined, "with_another_step", lambda run: None)
    whole = imagined(3, steps=4, experiment=method, dtype=dtype, ema=True)
    assert [place.step for place in short.places] == [place.step for place in whole.places]
    assert short == whole


def test_a_step_that_leaves_more_than_it_was_left_is_not_repeated() -> None:
    """Storage 0 stays; 1 and 2 are the steps' batches."""
    places = [Place(0, 0, "model"), Place(1, 1, "input"), Place(2, 2, "input"), Place(4, 2, "idle")]
    sizes = [Storage(num_bytes, scope=False) for num_bytes in (8, 4, 4)]
    trace = Trace(sizes, [0, 1, 1, 2, 2, 0], [], [0] * 6)
    longer = with_another_step(trace, places, [Tag(2, 1, "input"), Tag(3, 2, "input")])
    assert longer is not None
    assert longer[0].events == [0, 1, 1, 2, 2, 3, 3, 0]
    assert longer[1][4:] == [Place(4, 3, "input"), Place(6, 3, "idle")]
    assert longer[2][2:] == [Tag(4, 2, "input"), Tag(5, 3, "input")]
    for other in (Storage(5, scope=False), Storage(4, scope=True)):
        assert with_another_step(Trace([*sizes[:2], other], trace.events, [], [0] * 6), places, []) is None
    assert with_another_step(Trace(sizes, [0, 1, 2, 2, 1, 0], [], [0] * 6), places, []) is not None
    assert (
        with_another_step(Trace(sizes, [0, 1, 2, 1, 0, 2], [], [0] * 6), [*places[:3], Place(3, 2, "idle")], []) is None
    )


def test_deaths_at_one_instant_are_in_order_of_birth() -> None:
    trace = Trace(
        storages=[], events=[0, 1, 2, 2, 0, 1, 3, 3], operations=[], event_operations=[1, 1, 1, 2, 2, 2, 3, 3]
    )
    trace.order_deaths([0])
    assert trace.events == [0, 1, 2, 0, 1, 2, 3, 3]
    trace = Trace(storages=[], events=[0, 1, 2, 2, 0, 1], operations=[], event_operations=[1, 1, 1, 2, 2, 2])
    trace.order_deaths([4])
    assert trace.events == [0, 1, 2, 2, 0, 1], "a phase that begins between them keeps them apart"


def test_a_function_that_leaves_more_than_its_result_is_run_each_time() -> None:
    tracer, kept = Tracer(host_too=True), []

    def hoards(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 2)
        return x + 1

    with torch.no_grad(), tracer:
        x = torch.ones(4)
        for _ in range(3):
            tracer.apply(hoards, (x,))
    assert len(kept) == 3


def test_an_empty_batch_apart_every_loop_has_its_rounds() -> None:
    tracer = Tracer()
    assert [list(tracer.rounds(count)) for count in (0, 1, 3, 4, 9)] == [[], [0], [0, 1, 2], [0, 1, 3], [0, 1, 8]]
