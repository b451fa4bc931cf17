"""Paired comparisons: who goes when, what ratios say, what files hold, what is refused."""

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from memory_test.compare import schema
from memory_test.compare.figure import time_against_memory
from memory_test.compare.ratios import less, paired, rotated
from memory_test.compare.rounds import take_turns
from memory_test.compare.suite import load_suite
from memory_test.compare.table import HEADINGS, describe_choices, markdown_page, terminal_page
from memory_test.report.palette import to_svg
from memory_test.sweep.grid import SHIPPED
from memory_test.sweep.turns import ParentTurns, WorkerTurns
from tests.comparisons import comparison, contender, lost

SUITE = """
rounds: 3
base: {model: DiT-S/2, depth: 1, hidden_size: 32, num_heads: 2, image_size: 64, num_threads: 1, warmup: 0}
configurations:
  - {name: n1, batch_size: 1}
  - {name: n2, batch_size: 2}
contenders: [ghost]
"""


class Player:
    """Notes its turns, and drops out in one of them."""

    def __init__(self, name: str, log: list[str], dies_at: int = 99) -> None:
        self.name, self.log, self.left = name, log, dies_at

    def turn(self) -> bool:
        self.log.append(self.name)
        self.left -= 1
        return self.left > 0


def test_rotation() -> None:
    assert [rotated("abc", by) for by in (0, 1, 3, -1)] == [list("abc"), list("bca"), list("abc"), list("cab")]
    assert rotated([], 2) == []


def test_turns_rotate_from_round_to_round_after_the_untimed_ones() -> None:
    log: list[str] = []
    take_turns([Player(name, log) for name in "abc"], num_turns=4, untimed=1)
    assert "".join(log) == "cab" + "abc" + "bca" + "cab"


def test_who_drops_out_leaves_the_others_to_go_on() -> None:
    log: list[str] = []
    take_turns([Player("a", log), Player("b", log, dies_at=2), Player("c", log)], num_turns=3, untimed=0)
    assert "".join(log) == "abc" + "bca" + "ca"


def test_without_the_baseline_the_rounds_end() -> None:
    log: list[str] = []
    take_turns([Player("a", log, dies_at=2), Player("b", log), Player("c", log)], num_turns=9, untimed=0)
    assert "".join(log) == "abc" + "bca"


def test_the_token_goes_to_and_fro() -> None:
    """A worker answers when it is built and after every turn but the last, which it ends by leaving."""
    log: list[str] = []
    with ParentTurns() as turns:
        token, done = os.dup(turns.token), os.dup(turns.done)
        turns.close_worker_ends()

        def work() -> None:
            gate = WorkerTurns(token, done, steps_per_turn=2, rest=lambda: log.append("rest"))
            for step in range(1, 5):
                gate(step)
                log.append(str(step))
            os.close(done)

        worker = threading.Thread(target=work)
        worker.start()
        assert turns.wait(10) == "done"
        assert log == ["rest"]
        assert turns.wait(0.01) == "timeout"
        turns.give()
        assert turns.wait(10) == "done"
        assert log == ["rest", "1", "2", "rest"]
        turns.give()
        assert turns.wait(10) == "exited"
        worker.join()
        os.close(token)
        turns.give()  # nobody is there, and nothing happens
    assert log[-2:] == ["3", "4"]


def test_a_worker_whose_parent_is_gone_does_not_wait() -> None:
    with ParentTurns() as turns:
        token, done = os.dup(turns.token), os.dup(turns.done)
    with pytest.raises(BrokenPipeError):
        WorkerTurns(token, done, 1, lambda: None)(1)
    os.close(done)
    done = os.open(os.devnull, os.O_WRONLY)
    with pytest.raises(EOFError, match="is gone"):
        WorkerTurns(token, done, 1, lambda: None)(1)
    os.close(token)
    os.close(done)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.5, 4))
def test_a_slow_stretch_of_the_machine_leaves_paired_ratios(machine: list[float], cost: float) -> None:
    spread = paired([cost * slow for slow in machine], machine)
    assert (spread.q1, spread.median, spread.q3) == pytest.approx((cost, cost, cost))


def test_quartiles_and_noise() -> None:
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == schema.Spread(median=3.0, q1=2.0, q3=4.0)
    assert paired([3.0], [2.0]) == schema.Spread(median=1.5, q1=1.5, q3=1.5)
    assert less([3.0, 4.0], [1.0, 0.5]) == [2.0, 3.5]
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


# --- files --------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    made = comparison([contender("vanilla"), contender("ghost"), lost("opacus")])
    (tmp_path / "n8.json").write_text(schema.dump(made))
    assert schema.load(tmp_path / "n8.json") == made


def test_stored_ratios_follow_from_the_stored_times() -> None:
    data = json.loads(schema.dump(comparison()))
    base = data["contenders"][0]["step_times_s"]
    for entry in data["contenders"]:
        again = paired(less(entry["step_times_s"], entry["noise_times_s"]), base)
        assert entry["time_ratio_without_noise"] == dataclasses.asdict(again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": schema.SCHEMA_VERSION + 1}, "newer memory-test"),
        ({"baseline": 3}, "at baseline"),
        ({"surprise": 1}, "at surprise"),
    ],
)
def test_what_is_not_a_comparison_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "n8.json"
    path.write_text(json.dumps({**json.loads(schema.dump(comparison())), **change}))
    with pytest.raises(UsageError, match=words):
        schema.load(path)


# --- comparison files ---------------------------------------------------------------------------------------------


def suite_file(folder: Path, text: str = SUITE) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_the_baseline_enters_every_configuration_first(tmp_path: Path) -> None:
    text = SUITE.replace("[ghost]", "[ghost, {label: again, method: ghost, only: [n2]}]")
    suite = load_suite(suite_file(tmp_path, text))
    assert [[e.label for e in c.entrants] for c in suite.configurations] == [
        ["vanilla", "ghost"],
        ["vanilla", "ghost", "again"],
    ]
    assert [c.baseline.config.batch_size for c in suite.configurations] == [1, 2]
    assert (suite.name, suite.rounds, suite.settle_steps) == ("c", 3, None)


@pytest.mark.parametrize("name", ["engine_cpu", "engine_h100"])
def test_shipped_files_load(name: str) -> None:
    suite = load_suite(SHIPPED / f"{name}.yaml")
    assert suite.rounds >= 15
    assert all(len(c.entrants) > 3 for c in suite.configurations)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds: 3", "rounds: 0", r"rounds: got 0; accepted: an integer >= 1"),
        ("rounds: 3", "turns: 3", r"key: got 'turns'; accepted: name, "),
        ("[ghost]", "[gost]", r"contenders.method: got 'gost'; accepted: vanilla, "),
        ("[ghost]", "[]", r"contenders: got \[\]; accepted: a list"),
        ("[ghost]", "[7]", r"contenders: got 7; accepted: a method"),
        ("[ghost]", "[{method: ghost, budget: 1}]", r"contenders key: got 'budget'; accepted: label, "),
        ("[ghost]", "[ghost, ghost]", r"contenders.label: got 'ghost'; accepted: each name once; .* needs labels"),
        ("[ghost]", "[vanilla]", r"got 'vanilla'; .*the baseline, vanilla, enters by itself"),
        ("[ghost]", "[{method: ghost, only: [n3]}]", r"contenders.only: got 'n3'; accepted: n1, n2"),
        ("[ghost]", "[{method: ghost, only: n1}]", r"contenders.only: got 'n1'; accepted: a list"),
        (
            "[ghost]",
            "[{method: ghost, memory_budget_of_baseline: 1.03}]",
            r"memory_budget_of_baseline: got 1.03; accepted: None; ghost takes no memory budget",
        ),
        ("name: n2", "name: n1", r"configurations.name: got 'n1'; accepted: each name once"),
        ("name: n2", "name: a/b", r"configurations.name: got 'a/b'; .*it names a file"),
        ("batch_size: 2", "batch_size: 0", r"batch_size: got 0"),
        ("batch_size: 2", "batchsize: 2", r"batchsize"),
        ("batch_size: 2", "num_iter: 2", r"num_iter: got 2; accepted: nothing; rounds says"),
        ("warmup: 0", "experiment: ghost", r"base.experiment: got 'ghost'; .*named under contenders"),
        ("batch_size: 2", "device: cuda", r"device: got 'auto, cuda'; accepted: one device"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_suite(suite_file(tmp_path, SUITE.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_a_budget_is_a_multiple_of_the_baselines_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ghost", dataclasses.replace(METHODS["ghost"], takes_memory_budget=True))
    entries = "[{label: tight, method: ghost, memory_budget_of_baseline: 0.5}, ghost]"
    tight, free = load_suite(suite_file(tmp_path, SUITE.replace("[ghost]", entries))).configurations[0].entrants[1:]
    assert tight.with_budget(3 * 2**30).memory_budget_gib == 1.5
    assert free.with_budget(3 * 2**30).memory_budget_gib is None


# --- text and figure ----------------------------------------------------------------------------------------------


def test_tables_name_every_contender_and_failure() -> None:
    made = comparison([contender("vanilla"), contender("ghost"), lost("opacus")])
    for text in (terminal_page(made), markdown_page("c", [made], {"n8": "figures/n8.png"})):
        assert all(heading in text for heading in HEADINGS)
        assert "1.02" in text
        assert "1.7e-07" in text
        assert "keep 27, ghost 3" in text
        assert "opacus: oom in memory: backward: out of memory" in text


def test_choices_in_a_few_words() -> None:
    choices = {"num_parameters": 9, "attention_kernels": ["x"], "norm_rules": {}, "physical_batch_size": 2}
    assert describe_choices(choices) == "physical batch size 2"


def test_the_figure_shows_who_finished() -> None:
    figure = time_against_memory(comparison([contender("vanilla"), contender("ghost"), lost("opacus")]))
    assert figure is not None
    svg = to_svg(figure, "t", "d")
    assert ">ghost<" in svg
    assert ">vanilla<" in svg
    assert ">opacus<" not in svg
    assert time_against_memory(comparison([contender("vanilla"), lost("opacus")])) is None
