"""The campaign without a GPU: what is planned, what is skipped, what there is time for, what is made of results."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_dp.clipping import METHODS
from dit_dp.errors import UsageError
from memory_test.campaign import campaign, cases, edges, grids, processes
from memory_test.campaign.agreement import compared, edge_verdict, kept_targets, percentile, summary
from memory_test.campaign.args import CampaignArgs
from memory_test.campaign.budget import HEADROOM, Budget, Pace
from memory_test.campaign.campaign import RUNNERS, Outcome, Site, run_campaign, run_parts
from memory_test.campaign.parts import PARTS, Part, chosen, describe_parts
from memory_test.campaign.tables import markdown, rows
from memory_test.campaign.workspaces import split
from memory_test.core import store
from memory_test.core.config import ExperimentConfig
from memory_test.core.environment import COMMIT_VARIABLE
from memory_test.core.schema import Record
from memory_test.predict.emulator.cases import CASES, allocator_options
from memory_test.predict.emulator.figure import scatter
from memory_test.predict.emulator.record import PEAKS
from memory_test.predict.emulator.sides import Kept
from memory_test.sweep import sweep as sweeps
from memory_test.sweep.grid import Sweep, load_sweep
from tests.factories import environment, record


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def a_site(folder: Path, said: list[str] | None = None) -> Site:
    """Return where parts work, with a GPU that is not asked for anything."""
    say: Callable[[str], None] = (lambda text: None) if said is None else said.append
    return Site(root=folder, card="H100-80GB", environment=environment(), say=say)


def a_part(**changes: Any) -> Part:
    """Return a part of a few steps."""
    facts: dict[str, Any] = {"name": "p", "what": "w", "kind": "sweep", "steps": 3, "step_seconds": 10.0}
    return Part(**{**facts, **changes})


def a_pace(seconds: float = 1e6, expected: float = 1.0, clock: Clock | None = None) -> Pace:
    return Pace(Budget(seconds, clock or Clock()), expected)


# --- what is planned ----------------------------------------------------------------------------------------------


def test_parts_are_named_once_and_can_be_run() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert callable(campaign.runner(part.kind))
        assert part.minutes == part.steps * part.step_seconds / 60
    assert {part.kind for part in PARTS} == set(RUNNERS)


def test_every_method_dtype_size_and_shape_is_in_the_engines_parts() -> None:
    parts = {part.name: grids.sweep_of(part) for part in PARTS if part.file == "h100_engine"}
    assert len(parts) == 18
    for name, sweep in parts.items():
        assert sweep.stop_at_oom == "batch_size"
        assert {c.experiment for c in sweep.cells} == set(METHODS) - ({"opacus-ew"} if "bf16" in name else set())
        assert {c.batch_size for c in sweep.cells if c.experiment == "microbatch"} <= {1, 2, 4, 8, 16}
        batches = [cell.batch_size for cell in sweep.cells]
        assert batches == sorted(batches), "all methods at one batch before any at the next"
        assert batches[0] == 1
    resolved = parts["engine-xl-rgb-bf16"].cells[0].resolve(device="cuda", num_threads=1)
    assert resolved["num_tokens"] == 16384


def test_the_numbers_of_steps_are_those_that_there_are() -> None:
    known = {part.name: part.steps for part in PARTS}
    assert known["prediction"] == len(CASES)
    assert known["edges"] == 2 * len(edges.ALL_EDGES)
    assert known["predictions"] == len(edges.ALL_EDGES)
    assert known["kernels"] == len(processes.KERNELS)
    assert known["smoke"] == len(grids.sweep_of(PARTS[0]).cells)
    trials = [cases.Trial(case) for case in CASES]
    trials += [trial for edge in edges.ALL_EDGES for trial in edges.trials_of(edge, 7)]
    assert len({trial.file_name for trial in trials}) == len(trials)


def test_parts_are_chosen_by_name_or_beginning() -> None:
    assert [part.name for part in chosen(["report"])] == ["report"]
    assert [part.name for part in chosen(["prediction"])] == ["prediction"], "a whole name means that part alone"
    assert len(chosen(["engine-xl"])) == 6
    assert all(part.on_gpu for part in chosen([]))
    with pytest.raises(UsageError, match=r"^part: got 'engines'; accepted: smoke, "):
        chosen(["engines"])


def test_the_list_says_minutes_and_needs() -> None:
    lines = describe_parts().splitlines()
    assert any(line.split()[:3] == ["smoke", "2", "CUDA,"] for line in lines)
    assert all(any(line.startswith(part.name + " ") for line in lines) for part in PARTS)


# --- time -------------------------------------------------------------------------------------------------------


def test_nothing_is_begun_that_would_not_fit(clock: Clock) -> None:
    pace = a_pace(60, 25, clock)
    assert pace.begin() == 60
    clock.now += 20
    assert pace.begin() == 40, "20 s were needed: 25 with headroom"
    clock.now += 16
    assert HEADROOM * 20 > 24
    assert pace.begin() is None, "24 s are left"


def test_a_guess_counts_until_the_first_step_is_through(clock: Clock) -> None:
    budget = Budget(100, clock)
    assert Pace(budget, 101).begin() is None
    pace = Pace(budget, 90)
    assert pace.begin() is not None
    clock.now += 4
    assert pace.begin() == 96
    clock.now += 200
    assert budget.left() == 0
    assert Pace(budget, 0).begin() is None, "not even what takes no time"


def test_parts_that_lack_something_are_skipped_and_failures_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    outcomes = iter([Outcome(done=2, left=1), Outcome(done=1, left=0, failed=1)])
    monkeypatch.setattr(campaign, "runner", lambda kind: lambda part, site, pace: next(outcomes))
    monkeypatch.setattr(campaign, "available", lambda need: need != "compute-sanitizer")
    lacking = a_part(name="lacking", needs=("CUDA", "compute-sanitizer"))
    site, budget = a_site(tmp_path), Budget(60, clock)
    assert run_parts([lacking, a_part()], site, budget) == 0
    assert run_parts([a_part()], site, budget) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "lacking: skipped, there is no compute-sanitizer here",
        "p: 2 done, 1 left",
        "p: 1 done, 1 failed, complete",
    ]


# --- no GPU -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(config: ExperimentConfig) -> None:
        raise UsageError.for_value("device", config.device, "cpu", "no CUDA device can be used here")

    monkeypatch.setattr(campaign, "probe", no_device)
    with pytest.raises(UsageError, match=r"^device: got 'no CUDA device'.*--part predictions report") as raised:
        run_campaign(CampaignArgs(output_dir=tmp_path / "d"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "d").exists()


def test_what_needs_no_gpu_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "probe", lambda config: pytest.fail("asked for a GPU"))
    assert run_campaign(CampaignArgs(output_dir=tmp_path / "d", part=("report",))) == 0
    assert run_campaign(CampaignArgs(output_dir=tmp_path / "e", list_parts=True)) == 0
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("changes", "start"), [({"minutes": 0.0}, "minutes: got 0.0"), ({"card": "H1"}, "card: got 'H1'")]
)
def test_mistakes_are_refused(changes: dict[str, Any], start: str) -> None:
    with pytest.raises(UsageError) as raised:
        CampaignArgs(**changes)
    assert str(raised.value).startswith(start)


# --- sweeps that stop at the edge ---------------------------------------------------------------------------------

SWEEP = """
stop_at_oom: batch_size
base: {model: DiT-S/2, device: cuda}
grid: {batch_size: [1, 2, 4, 8], experiment: [vanilla, ghost]}
exclude: [{experiment: ghost, batch_size: [1, 2]}]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "s.yaml").write_text(SWEEP)
    return load_sweep(tmp_path / "s.yaml")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[ExperimentConfig]:
    """Let cells end as their batch says, without workers: vanilla breaks at 4, ghost at 8 by time."""
    seen: list[ExperimentConfig] = []

    def run_cell(config: ExperimentConfig, usage_is_error: bool) -> Record:
        seen.append(config)
        broken = {"vanilla": "oom", "ghost": "timeout"}[config.experiment]
        status: Any = broken if config.batch_size >= {"vanilla": 4, "ghost": 8}[config.experiment] else "ok"
        return record(config.experiment, config.batch_size, status=status)

    monkeypatch.setattr(sweeps, "run_cell", run_cell)
    monkeypatch.setattr(sweeps, "probe", lambda config: (environment(), config.resolve(device="cuda", num_threads=1)))
    return seen


def names(found: list[ExperimentConfig]) -> list[tuple[str, int]]:
    return [(config.experiment, config.batch_size) for config in found]


def test_a_sweep_stops_at_the_edge_and_leaves_no_record_beyond(
    sweep: Sweep, ran: list[ExperimentConfig], tmp_path: Path
) -> None:
    plan = sweeps.prepare(sweep, tmp_path / "d")
    assert len(plan.pending) == 6
    found = list(sweeps.run(plan))
    assert names(ran) == [("vanilla", 1), ("vanilla", 2), ("vanilla", 4), ("ghost", 4), ("ghost", 8)]
    assert len(found) == len(list((tmp_path / "d").glob("*.json"))) == 5
    assert sweeps.prepare(sweep, tmp_path / "d").pending == [], "the edge is known from the records"


def test_permission_ends_a_sweep_and_a_cell_cut_short_is_none(
    sweep: Sweep, ran: list[ExperimentConfig], tmp_path: Path
) -> None:
    plan = sweeps.prepare(sweep, tmp_path / "d")
    answers = iter([50.0, None])
    (only,) = sweeps.run(plan, permit=lambda cell: next(answers))
    assert ran[0].timeout_s == 50.0
    assert only[1].config_requested["timeout_s"] == plan.cells[0].config.timeout_s, "as asked for, not as limited"
    ghost = [cell for cell in plan.cells if cell.config == dataclasses.replace(cell.config, experiment="ghost")]
    cut = dataclasses.replace(plan, cells=ghost[1:])
    assert list(sweeps.run(cut, permit=lambda cell: 3.0)) == []
    assert not ghost[1].path.exists()


@pytest.mark.parametrize("axis", ["experiment", "depth", "[batch_size]"])
def test_an_axis_that_does_not_increase_is_refused(axis: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP.replace("stop_at_oom: batch_size", f"stop_at_oom: {axis}"))
    with pytest.raises(UsageError, match=r"stop_at_oom: got .*; accepted: a field of grid whose numbers increase"):
        load_sweep(tmp_path / "s.yaml")


def test_a_part_takes_its_share_of_a_sweep_as_far_as_there_is_time(
    sweep: Sweep, ran: list[ExperimentConfig], tmp_path: Path, clock: Clock
) -> None:
    part, said = a_part(file=str(tmp_path / "s.yaml"), where={"experiment": "vanilla"}), []
    site = a_site(tmp_path, said)
    assert grids.run_sweep(part, site, a_pace(5, 6, clock)) == Outcome(done=0, left=4)
    assert grids.run_sweep(part, site, a_pace(500, 6, clock)) == Outcome(done=3, left=0)
    assert grids.run_sweep(part, site, a_pace(500, 6, clock)) == Outcome(done=3, left=0)
    assert names(ran) == [("vanilla", 1), ("vanilla", 2), ("vanilla", 4)]
    assert [line.rpartition(": ")[0].count("DiT-S/2") for line in said] == [1, 1, 1]


# --- single configurations ----------------------------------------------------------------------------------------


def a_result(trial: cases.Trial, **changes: Any) -> dict[str, Any]:
    """Return the measured side of a trial, made up."""
    facts = {"name": trial.name, "changes": trial.case.changes, "status": "ok", "allocator": {}, "use": {}}
    facts |= {
        "schema_version": 1,
        "environment": dataclasses.asdict(environment(allocator={"settings": "of the case"})),
    }
    peaks, choices = dict.fromkeys(PEAKS, 1000), {"attention_kernels": ["k"], "norm_rules": {"a": 1}}
    return {**facts, "peaks": peaks, "phases": {"forward": [900, 1000]}, "choices": choices, **changes}


def test_measured_configurations_are_kept_and_failed_ones_tried_again_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, seen = iter(["ok", "error", "oom", None, "ok", "ok"]), []

    def measure(trial: cases.Trial, environment: Any, seconds: float) -> dict[str, Any] | None:
        seen.append(trial)
        status = next(ends)
        return None if status is None else a_result(trial, status=status)

    monkeypatch.setattr(cases, "measure", measure)
    trials, part = [cases.Trial(case) for case in CASES[:4]], a_part(name="prediction")
    site = a_site(tmp_path)
    first = cases.run_trials(trials, part, site, a_pace())
    assert first == Outcome(done=3, left=1, failed=1), "the fourth was cut short"
    assert cases.run_trials(trials, part, site, a_pace()) == Outcome(done=4, left=0, failed=1)
    retrying = dataclasses.replace(site, retry_failed=True)
    assert cases.run_trials(trials, part, retrying, a_pace()) == Outcome(done=4, left=0)
    assert seen == [*trials, trials[3], trials[1]]


def test_small_memory_passes_share_the_card_and_large_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def case(model: str, batch: int) -> Any:
        changes = {"model": model, "experiment": "vanilla", "batch_size": batch}
        return next(c for c in CASES if c.changes == changes)

    small, large = cases.Trial(case("DiT-S/2", 1)), cases.Trial(case("DiT-XL/2", 1))
    whole = dataclasses.replace(small, usable_bytes=72 * 2**30)
    groups = cases.side_by_side([small, small, large, large, large, whole, small], 4)
    assert list(groups) == [[small, small, large], [large, large], [whole], [small]]
    alone = cases.Trial(next(c for c in CASES if c.changes["experiment"] == "auto"))
    assert alone.lanes(4) == 4, "it times its rules, and takes what is free for its budget"
    assert list(cases.side_by_side([small, large, whole], 1)) == [[small], [large], [whole]]

    use = {"process_bytes": 1, "device_used_bytes": 2}
    monkeypatch.setattr(cases, "measure", lambda trial, environment, seconds: a_result(trial, use=dict(use)))
    site = dataclasses.replace(a_site(tmp_path), lanes=2)
    part, trials = a_part(name="prediction"), [small, cases.Trial(case("DiT-S/2", 128)), large]
    assert cases.run_trials(trials, part, site, a_pace()) == Outcome(done=3, left=0)
    used = [cases.load(tmp_path / "prediction" / trial.file_name)["use"] for trial in trials]
    assert used == [{"process_bytes": 1}, {"process_bytes": 1}, use]


def test_results_of_another_commit_are_refused_or_measured_again(tmp_path: Path) -> None:
    trial, path = cases.Trial(CASES[0]), tmp_path / "r.json"
    store.write_text(path, json.dumps(a_result(trial)))
    assert cases.kept(path, environment(), "refuse") is not None
    other = environment(commit="f" * 40)
    assert cases.kept(path, other, "rerun") is None
    with pytest.raises(UsageError, match=r"was measured with commit="):
        cases.kept(path, other, "refuse")


def test_an_edge_is_tried_at_its_batch_and_one_above_within_a_cap() -> None:
    edge = edges.ALL_EDGES[0]
    at, above = edges.trials_of(edge, 37)
    assert (at.case.changes["batch_size"], above.case.changes["batch_size"]) == (37, 38)
    assert at.memory_fraction(8 * edge.usable_bytes) == 1 / 8
    assert at.config.device == "cuda"
    assert [trial.case.changes["batch_size"] for trial in edges.trials_of(edge, 0)] == [1]
    options = {"options": allocator_options(edge.case.settings)}
    results = [a_result(at, usable_bytes=edge.usable_bytes, allocator=options)]
    results += [a_result(above, usable_bytes=edge.usable_bytes, allocator=options, status="oom")]
    assert edges.tried(edge, json.loads(json.dumps(results))) == {37: "ok", 38: "oom"}
    assert [edges.tried(other, results) for other in edges.ALL_EDGES[1:]] == [{}] * (len(edges.ALL_EDGES) - 1)


def test_edges_are_tried_one_by_one_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    predicted: list[str] = []

    def largest_batch(edge: Any, card: Any, predictions: Any) -> int:
        predicted.append(edge.case.name)
        return 7

    def measure(trial: cases.Trial, environment: Any, seconds: float) -> dict[str, Any]:
        clock.now += 20
        return a_result(trial, status="ok" if trial.case.changes["batch_size"] == 7 else "oom")

    monkeypatch.setattr(edges, "largest_batch", largest_batch)
    monkeypatch.setattr(cases, "measure", measure)
    part = next(part for part in PARTS if part.name == "edges")
    found = edges.run_edges(part, a_site(tmp_path), a_pace(70, part.step_seconds, clock))
    assert found == Outcome(done=3, left=part.steps - 3)
    assert len(predicted) == 2
    assert edges.run_edges(part, a_site(tmp_path), a_pace(1e4, part.step_seconds, clock)).left == 0
    assert edges.run_edges(part, a_site(tmp_path), a_pace(1, part.step_seconds, clock)).done == 0
    assert len(predicted) == 2 + len(edges.ALL_EDGES), "no time, so nothing is predicted"


def test_the_largest_batch_is_predicted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edge, asked = edges.ALL_EDGES[0], []

    def predict(case: Any, card: Any) -> dict[str, Any]:
        asked.append(case.changes["batch_size"])
        assert card.usable_bytes == edge.usable_bytes
        return {"status": "ok" if case.changes["batch_size"] <= 35 else "oom"}

    monkeypatch.setattr(edges, "predict", predict)
    card = edges.CARDS["H100-80GB"]
    for _ in range(2):
        assert edges.largest_batch(edge, card, Kept(tmp_path)) == 35
    assert len(asked) == len(set(asked)) <= 8


# --- programs -----------------------------------------------------------------------------------------------------

PROGRAM = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
if path.stem == "bad": sys.exit("no such kernel")
path.write_text(json.dumps({"environment": json.loads(path.with_name("environment.txt").read_text())}))
"""


def test_programs_write_once_and_failures_leave_a_log(tmp_path: Path) -> None:
    (tmp_path / "environment.txt").write_text(json.dumps(dataclasses.asdict(environment())))
    steps = [processes.Step(tmp_path / f"{name}.json", ["-c", PROGRAM]) for name in ("good", "bad")]
    said: list[str] = []
    part, site = a_part(name="kernels"), a_site(tmp_path, said)
    assert processes.run_steps(steps, part, site, a_pace()) == Outcome(done=1, left=1, failed=1)
    assert "no such kernel" in (tmp_path / "bad.log").read_text()
    assert said[1].endswith("exit code 1: no such kernel; see bad.log")
    assert processes.run_steps(steps[:1], part, site, a_pace(seconds=0)) == Outcome(done=1, left=0), "kept"
    (tmp_path / "good.json").write_text("{")
    with pytest.raises(UsageError, match=r"accepted: a file of this campaign"):
        processes.run_steps(steps[:1], part, site, a_pace())


def test_each_program_is_a_module_that_writes_its_last_argument(tmp_path: Path) -> None:
    for name in ("calibration", "workspaces", "sanitizer", "kernels"):
        for step in processes.steps_of(name, tmp_path, "H100-80GB"):
            assert step.command[:3] == [sys.executable, "-P", "-m"]
            assert step.command[-1] == str(step.path)
    (only,) = processes.steps_of("calibration", tmp_path, "H100-80GB")
    assert only.path.name == "H100-80GB.json"


def test_a_history_is_split_into_what_stays_and_what_goes() -> None:
    history = [
        {"action": "alloc", "addr": 1, "size": 512},
        {"action": "segment_alloc", "addr": 1, "size": 2048},
        {"action": "alloc", "addr": 2, "size": 1024},
        {"action": "free_requested", "addr": 1, "size": 512},
        {"action": "free_completed", "addr": 1, "size": 512},
        {"action": "alloc", "addr": 1, "size": 256},
        {"action": "free_requested", "addr": 9, "size": 64},
    ]
    assert split(history) == ([512], [1024, 256])


# --- what is made of it -------------------------------------------------------------------------------------------


def a_prediction(allocated: int, reserved: int, **changes: Any) -> dict[str, Any]:
    peaks = dict.fromkeys(PEAKS, allocated) | {"peak_reserved_bytes": reserved}
    choices = {"attention_kernels": ["k"], "norm_rules": {"a": 1}}
    return {"status": "ok", "peaks": peaks, "phases": {"forward": [909, 1000]}, "choices": choices, **changes}


def test_predicted_against_measured() -> None:
    measured = a_result(cases.Trial(CASES[0]), use={"context_bytes": 500})
    entries = [
        compared(measured, a_prediction(1005, 1020)),
        compared(measured, a_prediction(980, 1000, choices={"attention_kernels": ["other"]})),
        compared(a_result(cases.Trial(CASES[1]), status="oom", peaks={}), a_prediction(1, 1)),
    ]
    assert entries[0]["worst_phase_error"] == pytest.approx(0.01)
    found = summary(entries)
    assert (found["count"], found["statuses_that_differ"], found["choices_that_differ"]) == (2, 1, 1)
    assert found["context_bytes"] == 500
    assert found["peak_allocated_bytes"]["median_relative_error"] == pytest.approx(0.0125)
    assert found["peak_reserved_bytes"]["worst_relative_error"] == pytest.approx(0.02)
    assert kept_targets(found) == {"allocated": False, "reserved": True}
    drawn = scatter({"summary": found, "configurations": entries[:2]}, "measured")
    assert drawn.axes[0].get_xlabel() == "measured (GiB)"
    assert summary(entries[2:]) == {"count": 0, "statuses_that_differ": 1}


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([5, 1, 4, 2, 3], 0.95) == 5
    assert percentile(list(range(1, 101)), 0.95) == 95


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ({7: "ok", 8: "oom"}, "right"),
        ({7: "ok", 8: "ok"}, "too small"),
        ({7: "oom", 8: "oom"}, "too large"),
        ({7: "ok"}, "not tried"),
        ({7: "ok", 8: "crashed"}, "failed"),
    ],
)
def test_an_edge_is_right_or_not(statuses: dict[int, str], verdict: str) -> None:
    assert edge_verdict(7, statuses) == verdict
    assert edge_verdict(0, {1: "oom"}) == "right"


def test_methods_stand_beside_ordinary_training_at_a_batch_that_both_ran() -> None:
    of_vanilla = [record("vanilla", batch) for batch in (1, 4, 16)] + [record("vanilla", 64, status="oom")]
    of_opacus = [record("opacus", 1), record("opacus", 4), record("opacus", 16, status="oom")]
    vanilla, ghost, opacus = rows([*of_opacus, *of_vanilla, record("ghost", 1, status="error")])
    assert (vanilla.fits, vanilla.breaks, vanilla.batch) == (16, 64, 16)
    assert (vanilla.memory, vanilla.throughput, vanilla.best) == (1, 1, 1)
    assert (opacus.fits, opacus.breaks, opacus.batch) == (4, 16, 4)
    assert opacus.memory == of_opacus[1].peak_allocated_bytes / of_vanilla[1].peak_allocated_bytes
    assert opacus.best is not None
    assert opacus.throughput is not None
    assert opacus.best < opacus.throughput < 1
    assert (ghost.fits, ghost.breaks, ghost.memory, ghost.best) == (0, None, None, None)
    text = markdown("DiT", [vanilla, opacus, ghost])
    assert "| vanilla | 16 (not 64) | 1.00 | 1.00 | 16 | 1.00 |" in text
    assert "| ghost | — | — | — | — | — |" in text


def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from memory_test.core import environment as here

    monkeypatch.setattr(here, "__file__", str(tmp_path / "memory_test" / "core" / "environment.py"))
    assert here.capture("cpu").commit is None
    monkeypatch.setenv(COMMIT_VARIABLE, "a" * 40)
    assert here.capture("cpu").commit == "a" * 40
    monkeypatch.setenv(COMMIT_VARIABLE, "main")
    assert here.capture("cpu").commit is None
