"""``memory-test compare`` with real workers on a tiny model: turns, resuming, failures of one contender."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dit_dp.clipping import METHODS
from memory_test import cli
from memory_test.compare import compare as comparing
from memory_test.compare import contest, schema
from memory_test.compare.rounds import run_rounds
from memory_test.compare.suite import load_suite
from memory_test.sweep.messages import Exchange, PhaseLine
from memory_test.sweep.process import Outcome, work
from tests.e2e.test_worker import config

SUITE = """
rounds: 3
base: {model: DiT-S/2, depth: 1, hidden_size: 32, num_heads: 2, image_size: 64, num_threads: 1, warmup: 1}
configurations:
  - {name: n2, batch_size: 2}
contenders: [ghost]
"""
PROTOCOL = schema.Protocol(rounds=3, untimed_rounds=2, settle_steps=1)


def say(text: str) -> None:
    """Tell nobody."""


def compare(folder: Path, *options: str) -> int:
    """Run the command on ``c.yaml`` in a folder."""
    return cli.main(["compare", str(folder / "c.yaml"), "--output-dir", str(folder / "d"), *options])


def test_a_comparison_from_file_to_table_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(SUITE)
    assert compare(tmp_path) == 0
    result = schema.load(tmp_path / "d" / "n2.json")
    vanilla, ghost = result.contenders
    assert [c.status for c in result.contenders] == ["ok", "ok"]
    assert [len(c.step_times_s) for c in result.contenders] == [3, 3]
    assert all(0 < noise < step for noise, step in zip(ghost.noise_times_s, ghost.step_times_s, strict=True))
    assert vanilla.noise_times_s == [0.0] * 3
    assert vanilla.time_ratio == schema.Spread(median=1.0, q1=1.0, q3=1.0)
    assert vanilla.gradient_error is None
    assert ghost.gradient_error is not None
    assert ghost.gradient_error < 1e-5
    assert ghost.memory_ratio is not None
    assert sum(ghost.breakdown_bytes.values()) == ghost.peak_allocated_bytes
    assert (tmp_path / "d" / "figures" / "n2.png").stat().st_size > 0
    assert "figures/n2.png" in (tmp_path / "d" / "report.md").read_text()
    assert "ghost" in capsys.readouterr().out

    written = (tmp_path / "d" / "n2.json").stat().st_mtime_ns
    assert compare(tmp_path) == 0
    assert "finished earlier" in capsys.readouterr().err
    assert (tmp_path / "d" / "n2.json").stat().st_mtime_ns == written

    (tmp_path / "c.yaml").write_text(SUITE.replace("rounds: 3", "rounds: 2"))
    assert compare(tmp_path) == 2
    assert "measured with other contenders or settings" in capsys.readouterr().err
    assert compare(tmp_path, "--configuration", "n3") == 2
    assert "configuration: got 'n3'; accepted: n2" in capsys.readouterr().err


def test_results_of_another_environment_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.comparisons import comparison
    from tests.factories import environment

    (tmp_path / "c.yaml").write_text(SUITE)
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(comparing, "probe", lambda config: (environment("cpu"), {"device": "cpu"}))
    other = comparison(name="n2", environment=environment("cpu", torch_version="0.0"))
    (tmp_path / "d" / "n2.json").write_text(schema.dump(other))
    assert compare(tmp_path) == 2
    pieces = comparing.prepare(load_suite(tmp_path / "c.yaml"), tmp_path / "d", "rerun")
    assert [piece.done for piece in pieces] == [None]


def test_who_cannot_run_is_told_and_the_others_take_their_turns() -> None:
    configs = {
        "vanilla": config(),
        "lost": config(pretrained=True, model="/no", depth=None, hidden_size=None, num_heads=None),
        "ghost": config(experiment="ghost"),
    }
    outcomes = run_rounds(configs, PROTOCOL, say)
    assert {label: outcome.status for label, outcome in outcomes.items()} == {
        "vanilla": "ok",
        "lost": "error",
        "ghost": "ok",
    }
    assert all(len((outcomes[label].answer or {})["step_times_s"]) == 3 for label in ("vanilla", "ghost"))


def kill(label: str, found: list[int]) -> None:
    """Send SIGKILL to the worker of a method once it has taken steps."""
    import psutil

    for _ in range(2400):
        for worker in psutil.Process().children():
            try:
                exchange = Exchange(Path(worker.cmdline()[-1]))
                method = json.loads(exchange.request.read_text())["config"]["experiment"]
                stepped = PhaseLine.read(exchange.phase) == "timing: idle"
            except (psutil.Error, OSError, IndexError):
                continue
            if method == label and stepped:
                os.kill(worker.pid, signal.SIGKILL)
                found.append(worker.pid)
                return
        time.sleep(0.02)


@pytest.mark.parametrize(("killed", "left"), [("ghost", {"vanilla", "ghost"}), ("vanilla", {"vanilla"})])
def test_a_worker_that_dies_in_the_rounds_ends_only_its_own_contention(killed: str, left: set[str]) -> None:
    found: list[int] = []
    killer = threading.Thread(target=kill, args=(killed, found))
    killer.start()
    configs = {"vanilla": config(), "ghost": config(experiment="ghost")}
    outcomes = run_rounds(configs, schema.Protocol(rounds=400, untimed_rounds=1, settle_steps=0), say)
    killer.join()
    assert found
    assert set(outcomes) == left
    assert outcomes[killed].status == "crashed"
    assert all(outcome.status == "ok" for label, outcome in outcomes.items() if label != killed)


def test_a_worker_that_takes_too_long_is_stopped() -> None:
    outcomes = run_rounds({"vanilla": config(timeout_s=0.05)}, PROTOCOL, say)
    assert outcomes["vanilla"].status == "timeout"


def test_budgets_reach_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float | None]] = []

    def fake(config: Any, task: str, options: Any = None) -> Outcome:
        asked.append((task, config.memory_budget_gib))
        repeat = {"peak_allocated_bytes": 2**30, "memory_source": "", "phases": {}, "breakdown_bytes": {}}
        empty = {"first_step_peak_allocated_bytes": None, "first_step_s": None, "step_times_s": []}
        answer = {"repeat": {**repeat, **empty}, "choices": {}, "max_grad_norm": 1.0, "gradient_error": 1e-7}
        ok = {"status": "ok", **answer}
        return Outcome(header=None, answer=ok, exit_code=0, timed_out=False, phase=None, stderr_tail="")

    monkeypatch.setitem(METHODS, "ghost", dataclasses.replace(METHODS["ghost"], takes_memory_budget=True))
    monkeypatch.setattr(contest, "work", fake)
    (tmp_path / "c.yaml").write_text(SUITE.replace("[ghost]", "[{method: ghost, memory_budget_of_baseline: 0.6}]"))
    entrants = load_suite(tmp_path / "c.yaml").configurations[0].entrants
    standings = [contest.Standing(entrant=entrant, config=entrant.config) for entrant in entrants]
    contest.measure_memory(standings, say)
    contest.measure_errors(standings, tmp_path, say)
    assert asked == [("memory", None), ("memory", 0.6), ("oracle", 0.6), ("gradient_error", 0.6)]


def test_without_the_baseline_nobody_is_measured(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(SUITE)
    entrants = load_suite(tmp_path / "c.yaml").configurations[0].entrants
    standings = [contest.Standing(entrant=entrant, config=entrant.config) for entrant in entrants]
    standings[0].config = config(batch_size=4096, image_size=256, memory_limit_gib=1.5)
    contest.measure_memory(standings, say)
    assert [standing.status for standing in standings] == ["oom", "skipped"]
    assert standings[1].failure is not None
    assert "vanilla" in standings[1].failure.message
    assert contest.measure_errors(standings, tmp_path, say) == (None, None)


def test_each_mechanism_has_its_oracle(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(SUITE.replace("[ghost]", "[ghost, per_layer, bookkeeping]"))
    entrants = load_suite(tmp_path / "c.yaml").configurations[0].entrants
    standings = [contest.Standing(entrant=entrant, config=entrant.config) for entrant in entrants]
    threshold, failure = contest.measure_errors(standings, tmp_path, say)
    assert threshold is not None
    assert failure is None
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "flat.safetensors",
        "per_layer.safetensors",
    ]
    assert standings[0].gradient_error is None
    assert all((standing.gradient_error or 1.0) < 1e-5 for standing in standings[1:])
    wrong = work(standings[2].config, "gradient_error", {"file": str(tmp_path / "flat.safetensors")})
    assert wrong.answer is not None
    assert wrong.answer["gradient_error"] > 0.01
