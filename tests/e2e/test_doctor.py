"""`memory-test doctor` in a subprocess: a DiT, models of the user's own, and mistakes."""

import json
from pathlib import Path

import pytest

from memory_test.doctor.args import OURS
from tests.e2e.test_commands import run

SMALL = ("DiT-S/2", "--depth", "1", "--hidden-size", "32", "--num-heads", "2")
MODELS = """
import torch
from torch import nn

def loss_fn(model, batch):
    x, target = batch
    return (model(x) - target).square().mean(1)

def rows(count, *shape):
    return torch.randn(count, *shape), 10 * torch.randn(count, 3)

def linear():
    print("said by the user's code")
    return nn.Linear(6, 3), loss_fn, rows(5, 6)

def convolution():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)), loss_fn, rows(4, 2, 6)

class Own(nn.Linear):
    def make_batch(self, num_examples):
        return loss_fn, rows(num_examples, 6)

def own():
    return Own(6, 3)

def broken():
    raise RuntimeError("no data")

def one_row():
    return nn.Linear(6, 3), loss_fn, rows(1, 6)

def mean_loss():
    return nn.Linear(6, 3), lambda model, batch: loss_fn(model, batch).mean(), rows(4, 6)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the user's module in it; the working directory is importable."""
    (tmp_path / "users_models.py").write_text(MODELS)
    return tmp_path


def test_a_dit_passes_every_check(folder: Path) -> None:
    done = run("doctor", *SMALL, "--json", "found.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(method in done.stdout for method in OURS)
    assert done.stdout.rstrip().endswith("checks passed.")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    document = json.loads((folder / "found.json").read_text())
    assert [d["subject"] for d in document["examination"]["diagnoses"]] == ["model", *OURS]
    assert document["environment"]["torch_version"]


@pytest.mark.parametrize("model", ["users_models:linear", "users_models:own"])
def test_a_users_model(model: str, folder: Path) -> None:
    done = run("doctor", model, "--methods", "ghost", "microbatch", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "said by" not in done.stdout
    assert "bookkeeping" not in done.stdout


def test_a_refusal_says_what_to_do(folder: Path) -> None:
    done = run("doctor", "users_models:convolution", "--methods", "ghost", "microbatch", cwd=folder)
    assert done.returncode == 1
    text = " ".join(done.stdout.split())
    assert "ghost: refused ghost cannot run on layer 0: no rule for Conv1d" in text
    assert "build it of Linear" in text
    assert "1 refused." in text


def test_a_peer_that_fails_is_shown(folder: Path) -> None:
    """Once this fails, Opacus drops non-finite examples, and README and docs/architecture.md say something old."""
    done = run("doctor", "users_models:linear", "--methods", "opacus", cwd=folder)
    assert done.returncode == 1
    assert "opacus, non-finite: failed, inf where at most 0.0001 may be" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("users_models:linear", "--depth", "3"), "depth: got 3; accepted: no value"),
        (("users_models:missing",), "linear, convolution"),
        (("users_models:broken",), "RuntimeError: no data"),
        (("users_models:one_row",), "accepted: at least 2"),
        (("users_models:mean_loss",), "one loss per example, shape (4,)"),
        (("users_models:rows",), "raised TypeError"),
        (("users_models:Own.make_batch",), "raised TypeError"),
        (("nn:x:y",), "module:callable"),
        (("DiT-Q/2",), "accepted: DiT-S/2"),
        (("DiT-S/2", "--methods", "vanilla"), "bookkeeping, "),
        (("DiT-S/2", "--methods", "ghost", "ghost"), "each method once"),
        (("DiT-S/2", "--batch-size", "1"), "an integer >= 2"),
        (("DiT-S/2", "--max-grad-norm", "0"), "max_grad_norm: got 0.0"),
        (("DiT-S/2", "--json", "no/found.json"), "mkdir -p no"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str, folder: Path) -> None:
    done = run("doctor", *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("memory-test: error: ")
    assert words in line
