"""`memory-test predict`, `plan` and `cards` in subprocesses: what they print and write, and mistakes."""

import json
import pickle
from pathlib import Path

import pytest

from memory_test.core import store
from memory_test.core.schema import BREAKDOWN
from memory_test.core.units import GIB
from tests.e2e.test_commands import run

SMALL = ("--model", "DiT-S/2", "--depth", "1", "--hidden-size", "64", "--num-heads", "2")
CARD = "custom:memory=0.5,sms=20,context=128"


def test_a_prediction_is_printed_and_leaves_record_page_and_snapshot(tmp_path: Path) -> None:
    files = ("--output", "r.json", "--timeline", "t.html", "--snapshot", "s.pickle")
    done = run("predict", "--experiment", "bookkeeping", *SMALL, "--batch-size", 8, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("allocated ± 0.5%", "reserved ± 3.5%", "CUDA context of 772 MiB", "H100-80GB has 79.10 GiB: fits"):
        assert words in done.stdout
    assert "largest error on an H100" in done.stdout
    record = store.load(tmp_path / "r.json")
    assert (record.status, record.source, record.experiment) == ("ok", "predicted", "bookkeeping")
    assert record.error_band is not None
    assert record.environment is not None
    assert (record.environment.device_type, record.environment.device_name) == ("cuda", "H100-80GB")
    assert list(record.breakdown_bytes) == list(BREAKDOWN)
    assert sum(record.breakdown_bytes.values()) == record.peak_allocated_bytes
    page = (tmp_path / "t.html").read_text()
    assert "predicted" in page
    assert "<svg" in page
    _check_snapshot(tmp_path / "s.pickle", record.peak_allocated_bytes)


def _check_snapshot(path: Path, peak: int | None) -> None:
    """The trace adds up to the peak; blocks of a segment lie one behind the other and fill it."""
    snapshot = pickle.loads(path.read_bytes())
    held, most = 0, 0
    for entry in snapshot["device_traces"][0]:
        held += entry["size"] * {"alloc": 1, "free_completed": -1}.get(entry["action"], 0)
        most = max(most, held)
    assert peak is not None
    assert 0.95 * peak <= most <= peak  # requested, not rounded
    assert snapshot["segments"]
    for segment in snapshot["segments"]:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
        assert segment["blocks"][0]["address"] == segment["address"]


def test_what_does_not_fit_is_said_recorded_and_drawn(tmp_path: Path) -> None:
    rest = ("--batch-size", 512, "--gpu", CARD, "--output", "r.json", "--timeline", "t.html")
    done = run("predict", "--experiment", "vanilla", *SMALL, *rest, cwd=tmp_path)
    assert done.returncode == 1
    assert "DOES NOT FIT" in done.stdout
    record = store.load(tmp_path / "r.json")
    assert record.status == "oom"
    assert record.failure is not None
    assert record.failure.phase in ("forward", "backward")
    assert record.failure.limit_bytes == GIB // 2 - 128 * 2**20
    assert record.peak_allocated_bytes is not None
    assert record.peak_allocated_bytes > record.failure.limit_bytes
    assert "<svg" in (tmp_path / "t.html").read_text()


def test_the_cpu_is_predicted_as_measured(tmp_path: Path) -> None:
    cell = ("--experiment", "ghost", *SMALL, "--image-size", 64, "--batch-size", 4, "--num-threads", 1)
    predicted = run("predict", *cell, "--gpu", "cpu", "--output", "p.json", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    measured = run("run", *cell, "--device", "cpu", "--num-iter", 1, "--output", "m.json", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    got, wanted = (store.load(tmp_path / name).peak_allocated_bytes for name in ("p.json", "m.json"))
    assert got is not None
    assert wanted is not None
    assert abs(got - wanted) <= 0.005 * wanted


def test_a_plan_recommends_and_its_command_is_predicted_to_fit(tmp_path: Path) -> None:
    budget = ("--epsilon", 8, "--delta", 1e-6, "--dataset-size", 10000, "--steps", 100)
    rest = ("--gpu", CARD, "--batch-size", 512, "--methods", "vanilla", "ghost", "--json", "plan.json")
    done = run("plan", *SMALL, *rest, *budget, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "noise multiplier" in done.stdout
    assert "recommended: ghost" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["recommended"] == "ghost"
    assert [row["status"] for row in plan["methods"]] == ["fits", "fits"]
    command = plan["command"].split()
    assert command[:2] == ["memory-test", "run"]
    words = [word for word in command[2:] if word not in ("--device", "cuda")]
    again = run("predict", *words, "--gpu", CARD, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr


def test_a_card_on_which_nothing_private_fits_is_one_line_after_the_table(tmp_path: Path) -> None:
    rest = ("--methods", "vanilla", "ghost", "--json", "plan.json")
    done = run("plan", *SMALL, "--gpu", "custom:memory=0.13,context=128", *rest, cwd=tmp_path)
    assert done.returncode == 2
    assert "too large" in done.stdout
    assert "recommended: nothing" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "gpu: nothing fits custom" in line
    assert "ghost: one example takes" in line
    assert "more than there is; a card of" in line
    assert (tmp_path / "plan.json").exists()


def test_ordinary_training_alone_can_be_planned(tmp_path: Path) -> None:
    done = run("plan", *SMALL, "--gpu", CARD, "--methods", "vanilla", cwd=tmp_path)
    assert done.returncode == 0
    assert "recommended: nothing" in done.stdout


def test_cards_are_listed_with_their_sources() -> None:
    done = run("cards")
    assert done.returncode == 0
    assert "H100-80GB" in done.stdout
    assert "datasheet" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "--experiment", "ghost", "--gpu", "H1000"), "gpu: got 'H1000'; accepted: H200-141GB, "),
        (("predict", "--experiment", "ghost", "--compile"), "compile: got True; accepted: False"),
        (("predict", "--experiment", "ghost", "--device", "cpu"), "device: got 'cpu'; accepted: auto"),
        (("predict", "--experiment", "ghost", "--output", "no/r.json"), "mkdir -p no"),
        (("predict", "--experiment", "ghost", "--snapshot", "."), "snapshot: got '.'"),
        (("predict", "--experiment", "ghost", "--max-split-size-mb", "5"), "max_split_size_mb: got 5"),
        (("predict", "--experiment", "ghost", "--memory-fraction", "2"), "memory_fraction: got 2.0"),
        (
            ("predict", "--experiment", "ghost", "--gpu", "cpu", "--snapshot", "s"),
            "snapshot: got 's'; accepted: a card",
        ),
        (("predict", "--experiment", "auto", "--memory-budget-gib", "0.001", *SMALL), "memory_budget: got "),
        (("plan", "--gpu", "24"), "gpu: got '24'"),
        (("plan", "--epsilon", "8"), "delta: got None"),
        (("plan", "--model", "mine:build"), "model: importing 'mine' raised ModuleNotFoundError"),
        (("cards", "H100"), "H100"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("memory-test: error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_calibration_of_this_cpu_gives_steps_their_time(tmp_path: Path) -> None:
    done = run("calibrate", "--device", "cpu", "--quick", "--seconds", 0.05, "--output", "cpu.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("off by") == 2
    cell = ("--experiment", "vanilla", *SMALL, "--gpu", "cpu", "--batch-size", 2, "--num-threads", 1)
    without, with_it = (run("predict", *cell, *extra, cwd=tmp_path) for extra in ((), ("--calibration", "cpu.json")))
    assert "no calibration for this device" in without.stdout
    assert "off by at most" in with_it.stdout
