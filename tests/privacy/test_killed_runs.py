"""Runs that are killed at any moment and go on: nothing is released twice, and nothing without being charged."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_dp.privacy import Ledger
from tests.privacy.witnessed_run import STEPS

KILLS = 50
SAMPLE = 2
SEED = 20261124
TIMEOUT_S = 120.0
MOST_LINES = 40
"""Of a witness before a kill: a third of a run's, so that a run is alive at most of them."""


def told(witness: Path) -> list[dict[str, object]]:
    """Return what the witness has; a line that was being written when the process died tells of nothing released."""
    lines = witness.read_text().splitlines() if witness.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start(folder: Path, witness: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.privacy.witnessed_run", str(folder), str(witness)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed_at(process: "subprocess.Popen[bytes]", witness: Path, lines: int, extra_s: float) -> bool:
    """Kill a process some time after the witness has grown by so many lines.

    Returns:
        Whether it was killed; `False`: it had come to its end before.
    """
    before, deadline = len(told(witness)), time.monotonic() + TIMEOUT_S
    while len(told(witness)) < before + lines and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(extra_s)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()[-2000:]
    return process.returncode == -signal.SIGKILL


def check(folder: Path, witness: Path) -> None:
    lines = told(witness)
    digests = Counter(line["digest"] for line in lines if line["kind"] == "noise")
    assert max(digests.values(), default=1) == 1  # no noise vector twice
    samples = [line["units"] for line in lines if line["kind"] == "sample"]
    for units in samples:
        assert isinstance(units, list)
        assert len(set(units)) == len(units)  # no record twice in one sum
    (ledger,) = folder.glob("*/ledger.jsonl")
    assert Ledger.read(ledger).num_charges >= len(samples)  # a step draws its sample after it is charged


def finish(folder: Path, witness: Path) -> None:
    process = start(folder, witness)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors.decode()[-2000:]


def test_an_undisturbed_run_is_charged_what_it_released(tmp_path: Path) -> None:
    folder, witness = tmp_path / "runs", tmp_path / "witness"
    finish(folder, witness)
    check(folder, witness)
    (ledger,) = folder.glob("*/ledger.jsonl")
    samples = [line for line in told(witness) if line["kind"] == "sample"]
    assert Ledger.read(ledger).num_charges == len(samples) == STEPS


def killed_and_resumed(tmp_path: Path, kills: int, chance: random.Random) -> None:
    """Kill runs that are alive so many times, going on after each; after one that came to its end, begin another."""
    killed, number = 0, 0
    while killed < kills:
        folder, witness = tmp_path / f"runs-{number}", tmp_path / f"witness-{number}"
        while killed < kills and killed_at(
            start(folder, witness), witness, chance.randrange(1, MOST_LINES), chance.random() * 0.02
        ):
            killed += 1
            if list(folder.glob("*/ledger.jsonl")) and told(witness):
                check(folder, witness)
        finish(folder, witness)
        check(folder, witness)
        assert sum(line["kind"] == "noise" for line in told(witness)) >= STEPS
        number += 1
        assert number <= kills, "most runs come to their end: kill earlier"


@pytest.mark.parametrize(("program", "alive"), [("", False), ("import time; time.sleep(60)", True)])
def test_only_what_is_alive_is_killed(tmp_path: Path, program: str, alive: bool) -> None:
    witness = tmp_path / "witness"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    if not alive:
        process.wait()
    assert killed_at(process, witness, 0, 0.0) is alive


def test_killed_runs_go_on_and_pay(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, SAMPLE, random.Random(SEED))


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(KILLS // 5))
def test_killed_runs_go_on_and_pay_every_time(tmp_path: Path, number: int, stated: Callable[[str, int], None]) -> None:
    stated("SIGKILLs of a run that then went on", 5)
    killed_and_resumed(tmp_path, 5, random.Random(SEED + number))
