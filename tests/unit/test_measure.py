"""The loop and the CPU meters on a real tiny model: every category is observed, and nothing is hidden."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS
from dit_dp.clipping.ghost import GhostEngine
from memory_test.core import measure as measuring
from memory_test.core.breakdown import running_total
from memory_test.core.config import ExperimentConfig
from memory_test.core.meters import Clock, CpuMemoryMeter
from memory_test.core.schema import BREAKDOWN, PHASES
from memory_test.core.workload import ImageData, Workload

PLANT_BYTES = 10 * 2**20


def tiny(experiment: str, **changes: Any) -> dict[str, Any]:
    """Return a resolved configuration that runs in a fraction of a second."""
    sizes = {"model": "DiT-S/2", "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 64, "batch_size": 3}
    config = ExperimentConfig(**{"experiment": experiment, "num_iter": 2, **sizes, **changes})
    return config.resolve(device="cpu", num_threads=1)


def measured(resolved: dict[str, Any]) -> measuring.Measured:
    """Measure without progress."""
    return measuring.measure(resolved, lambda phase: None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_through_the_same_loop(method: str) -> None:
    result = measured(tiny(method))
    repeat = result.repeat
    assert len(repeat.step_times_s) == 2
    assert repeat.first_step_s is not None
    wanted = [p for p in PHASES if METHODS[method].private or p not in ("clip", "noise")]
    assert list(repeat.phases) == wanted
    assert all(phase.time_s is not None and phase.peak_allocated_bytes for phase in repeat.phases.values())
    steady = [phase.peak_allocated_bytes for name, phase in repeat.phases.items() if name != "model"]
    assert max(steady) == repeat.peak_allocated_bytes  # type: ignore[type-var]
    assert list(repeat.breakdown_bytes) == list(BREAKDOWN)
    assert sum(repeat.breakdown_bytes.values()) == repeat.peak_allocated_bytes
    assert abs(repeat.breakdown_bytes["unattributed"]) < 0.01 * repeat.peak_allocated_bytes  # type: ignore[operator]
    by_part = repeat.breakdown_by_part
    assert by_part.keys() == {"backbone", "head", "elsewhere"}
    for category, size in repeat.breakdown_bytes.items():
        if category != "unattributed":
            assert sum(part.get(category, 0) for part in by_part.values()) == size
    parameters = 4 * result.choices["num_parameters"]
    assert 0 <= repeat.breakdown_bytes["parameters"] - parameters < 1024
    adamw = 8 * result.choices["num_trainable_parameters"]
    assert 0 <= repeat.breakdown_bytes["optimizer_state"] - adamw < 4096  # and a step counter a parameter
    assert result.choices["attention_kernels"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert repeat.timeline is not None
    assert max(repeat.timeline.allocated_bytes) <= repeat.peak_allocated_bytes  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # tracing reads it
def test_a_compiled_model_is_measured_with_its_compilation_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that needs no C++ compiler; `compile` itself is seen to be called, once a pass."""
    compile_in_place, seen = nn.Module.compile, []

    def compiling(self: nn.Module) -> None:
        seen.append(self)
        compile_in_place(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compiling)
    repeat = measured(tiny("bookkeeping", compile=True)).repeat
    assert len(seen) == 2
    assert repeat.first_step_s > 5 * max(repeat.step_times_s)  # type: ignore[operator]
    assert abs(repeat.breakdown_bytes["unattributed"]) < 0.01 * repeat.peak_allocated_bytes  # type: ignore[operator]
    measured(tiny("bookkeeping"))
    assert len(seen) == 2


def test_optimizer_state_is_born_in_the_first_step() -> None:
    repeat = measured(tiny("vanilla", batch_size=32)).repeat
    assert repeat.first_step_peak_allocated_bytes < repeat.peak_allocated_bytes  # type: ignore[operator]


def test_per_example_gradients_of_opacus_grow_with_the_batch() -> None:
    small = measured(tiny("opacus", batch_size=2)).repeat.breakdown_bytes["per_example_gradients"]
    large = measured(tiny("opacus", batch_size=4)).repeat.breakdown_bytes["per_example_gradients"]
    assert 0.9 < (large / 2) / small < 1.1
    assert measured(tiny("ghost")).repeat.breakdown_bytes["per_example_gradients"] == 0


def plant() -> Tensor:
    """Return 10 MiB that nothing else would allocate."""
    return torch.ones(PLANT_BYTES // 4)


class Saver(torch.autograd.Function):
    """Saves a planted tensor for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(plant())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        assert ctx.saved_tensors[0].numel()
        return g[0]


def difference(monkeypatch: pytest.MonkeyPatch, change: Any, method: str = "ghost") -> dict[str, int]:
    """Return by how much each category grows when `change` plants 10 MiB."""
    resolved = tiny(method)
    before = measured(resolved).repeat.breakdown_bytes
    change(monkeypatch)
    after = measured(resolved).repeat.breakdown_bytes
    return {name: after[name] - before[name] for name in BREAKDOWN if after[name] - before[name] > PLANT_BYTES // 2}


def in_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    original = measuring.build

    def build(resolved: dict[str, Any]) -> Workload:
        workload = original(resolved)
        workload.model.register_buffer("planted", plant())
        return workload

    monkeypatch.setattr(measuring, "build", build)


def in_saved_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    original = measuring.loss_function

    def loss_function(*arguments: Any) -> Any:
        inner = original(*arguments)
        return lambda model, batch: Saver.apply(inner(model, batch))

    monkeypatch.setattr(measuring, "loss_function", loss_function)


def in_optimizer_state(monkeypatch: pytest.MonkeyPatch) -> None:
    original = measuring.make_optimizer

    def make(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = original(*arguments, **options)
        optimizer.state[torch.zeros(1)]["planted"] = plant()
        return optimizer

    monkeypatch.setattr(measuring, "make_optimizer", make)


def in_input(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ImageData.batch

    def batch(self: ImageData, size: int) -> dict[str, Tensor]:
        return {**original(self, size), "planted": torch.ones(size, PLANT_BYTES // 4 // size)}

    monkeypatch.setattr(ImageData, "batch", batch)


def in_per_example_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GhostEngine._finish
    held: list[Tensor] = []

    def finish(self: GhostEngine, losses: Tensor) -> Tensor:
        held.clear()
        held.append(plant())
        return original(self, losses)

    monkeypatch.setattr(GhostEngine, "_finish", finish)
    monkeypatch.setattr(GhostEngine, "tracked_tensors", lambda self: (("per_example_gradients", t) for t in held))


def in_kept_for_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GhostEngine._settle

    def take(self: GhostEngine, parameter: nn.Parameter, parts: list[Any]) -> None:
        planted = plant()
        original(self, parameter, parts)
        del planted

    monkeypatch.setattr(GhostEngine, "_settle", take)


def in_other(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GhostEngine._take_norms

    def backward(self: GhostEngine, losses: Tensor, **options: bool) -> None:
        planted = plant()
        original(self, losses, **options)
        del planted

    monkeypatch.setattr(GhostEngine, "_take_norms", backward)


@pytest.mark.parametrize(
    ("category", "change"),
    [
        ("parameters", in_parameters),
        ("saved_activations", in_saved_activations),
        ("optimizer_state", in_optimizer_state),
        ("input", in_input),
        ("per_example_gradients", in_per_example_gradients),
        ("kept_for_clipping", in_kept_for_clipping),
        ("other", in_other),
    ],
)
def test_a_planted_tensor_appears_in_its_category(category: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = difference(monkeypatch, change)
    assert list(grown) == [category]
    assert abs(grown[category] - PLANT_BYTES) < 0.02 * PLANT_BYTES


def test_gradients_and_noise_are_seen_where_they_dominate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large table and a small batch the peak lies in the noise phase."""
    repeat = measured(tiny("ghost", num_classes=60_000, batch_size=1, optimizer="sgd")).repeat
    table = 4 * 60_001 * 32
    assert repeat.breakdown_bytes["gradients"] >= table
    assert repeat.breakdown_bytes["noise"] >= table


def test_running_total_follows_the_allocators_own() -> None:
    """The log's total differs from the profiler's `total_allocated` by what was held before it, and by nothing else."""
    meter = CpuMemoryMeter()
    with meter:
        measuring.run_loop(tiny("vanilla"), meter, 2, lambda phase: None)
    events = meter.read().log.events
    stack = list(meter._profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    found = []
    while stack:
        node = stack.pop()
        stack.extend(node.children)
        if node.name == "[memory]":
            found.append((node.start_time_ns, node.extra_fields.total_allocated))  # type: ignore[union-attr]
    totals = [total for _, total in sorted(found)]
    running = running_total(events)
    assert len(totals) == len(running) > 100
    assert {total - own for total, own in zip(totals, running, strict=True)} == {totals[0] - running[0]}


def test_clock_counts_each_phase_of_each_step() -> None:
    clock = Clock("cpu")
    measuring.run_loop(tiny("ghost"), clock, 3, lambda phase: None)
    times = clock.read()
    assert sorted(times.steps) == [1, 2, 3]
    for step, seconds in times.steps.items():
        parts = sum(by_step.get(step, 0.0) for phase, by_step in times.phases.items() if phase != "model")
        assert abs(parts - seconds) < 1e-9


def test_a_memory_budget_reaches_the_engine_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class Budgeted(GhostEngine):
        def __init__(self, model: nn.Module, *, memory_budget: int, **options: Any) -> None:
            given.append(memory_budget)
            super().__init__(model, **options)

    monkeypatch.setitem(METHODS, "ghost", dataclasses.replace(METHODS["ghost"], takes_memory_budget=True))
    monkeypatch.setattr("dit_dp.clipping.registry.engine_class", lambda method: Budgeted)
    measuring.measure_memory(tiny("ghost", memory_budget_gib=0.5), lambda phase: None)
    assert given == [2**29]


def test_the_gate_is_asked_before_every_step() -> None:
    steps: list[int] = []
    times, _ = measuring.time_steps(tiny("vanilla"), lambda phase: None, range(3, 4), steps.append)
    assert steps == [1, 2, 3]
    assert set(times.steps) == {1, 2, 3}


def test_waiting_at_the_gate_is_not_timed() -> None:
    clock = iter(range(1000))
    watched = Clock("cpu", rss_step=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memory_test.core.meters.time.perf_counter", lambda: float(next(clock)))
        measuring.run_loop(
            tiny("vanilla"), watched, 2, lambda phase: None, lambda step: [next(clock) for _ in range(50)]
        )
    assert all(seconds < 10 for seconds in watched.read().steps.values())
