"""A model of the user's own in a subprocess: a module in the working directory, measured, swept and reported."""

import json
from pathlib import Path

import pytest

from memory_test.core import store
from tests.e2e.test_commands import run

MODULE = "from tests.own_models import *\n"
ONE = ("--num-iter", "1", "--warmup", "0", "--num-threads", "1", "--device", "cpu")
SWEEP = """
base: {model: "own:fixed", num_threads: 1, num_iter: 1, warmup: 0, device: cpu}
grid: {experiment: [vanilla, ghost], batch_size: [3, 8]}
cells:
  - {model: DiT-S/2, depth: 1, hidden_size: 32, num_heads: 2, image_size: 64, experiment: vanilla}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the user's module in it."""
    (tmp_path / "own.py").write_text(MODULE)
    return tmp_path


def test_a_users_model_is_measured(folder: Path) -> None:
    done = run("run", "--experiment", "ghost", "--model", "own:Made", "--batch-size", "6", *ONE, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "ghost: own:Made, batch 6, float32" in done.stderr
    (path,) = (folder / "results" / "runs").iterdir()
    assert path.name.endswith("-ghost-own-Made-b6.json")
    record = store.load(path)
    assert record.status == "ok"
    assert record.config_resolved["num_tokens"] is None
    assert record.breakdown_bytes["input"] == 6 * (4 * 8 * 64 + 8 + 4 * 8 * 32)


def test_a_sweep_resumes_and_reports(folder: Path) -> None:
    (folder / "s.yaml").write_text(SWEEP)
    done = run("sweep", "s.yaml", "--output-dir", "d", "--report", cwd=folder)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (folder / "d").glob("*.json"))
    assert sum(name.startswith(("vanilla-own-fixed-b", "ghost-own-fixed-b")) for name in names) == 4
    report = (folder / "d" / "report" / "report.md").read_text()
    assert "own:fixed · float32\n" in report
    assert "None" not in report
    again = run("sweep", "s.yaml", "--output-dir", "d", cwd=folder)
    assert again.returncode == 0
    assert "5 of 5 cells were finished earlier" in again.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own:broken", "own:broken() raised RuntimeError: no data"),
        ("own:column", "one loss per example, shape (4,)"),
        ("own:lists", "a tuple or dict of tensors"),
        ("nowhere:build", "set PYTHONPATH to the folder that holds nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(name: str, words: str, folder: Path) -> None:
    done = run("run", "--experiment", "ghost", "--model", name, "--batch-size", "4", *ONE, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    _, line = done.stderr.strip().splitlines()
    assert line.startswith("memory-test: error: ")
    assert words in line


def test_a_model_that_is_too_large_is_out_of_memory_and_no_mistake(folder: Path) -> None:
    arguments = ("--experiment", "vanilla", "--model", "own:too_large", "--memory-limit-gib", "2", *ONE)
    done = run("run", *arguments, "--output", "r.json", cwd=folder)
    assert done.returncode == 1, done.stderr
    record = json.loads((folder / "r.json").read_text())
    assert record["status"] == "oom"
    assert record["failure"]["requested_bytes"] == 4 * 2**34
