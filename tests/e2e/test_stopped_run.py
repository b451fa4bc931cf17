"""Two processes that are stopped: what was paid for is kept, and the run goes on as what it was."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_dp.privacy import Ledger

STEPS = 12
OPTIONS = (
    f"--data digits --in-channels 3 --image-size 8 --model DiT-S/2 --hidden-size 16 --depth 1 --num-heads 2 "
    f"--num-classes 10 --batch-size 16 --steps {STEPS} --noise-multiplier 1 --method bookkeeping --num-samples 0 "
    "--device cpu"
)
TIMEOUT_S = 120


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "dit_dp.train", *OPTIONS.split(), "--output-dir", str(folder), *options]


def train(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_two_processes_end_after_one_step(tmp_path: Path, stop: signal.Signals) -> None:
    # slow enough to be stopped on the way: a grid of samples after every step
    slow = ["--num-samples", "16", "--sample-every", "1", "--devices", "2"]
    process = subprocess.Popen(command(tmp_path, *slow), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(tmp_path.glob("*/samples/*.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + stop, errors
    assert errors.count("interrupted; go on with --resume auto") == 1
    assert "Traceback" not in errors
    (run,) = tmp_path.glob("0*")
    (state,) = run.glob("checkpoints/*/state.json")
    step = json.loads(state.read_text())["state"]["step"]
    assert 0 < step < STEPS

    refused = train(tmp_path, "--resume", "auto")
    assert refused.returncode == 2
    assert (
        refused.stderr.strip()
        .splitlines()[-1]
        .startswith("dit-dp: error: resume: world_size: 1 here, 2 in the checkpoint")
    )
    assert train(tmp_path, "--resume", "auto", "--any-world-size").returncode == 0
    assert Ledger.read(run / "ledger.jsonl").num_charges == STEPS  # none lost
