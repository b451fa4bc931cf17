"""Runs whose files cannot be written: one line that names the file, exit code 2, and what was paid for is kept."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dit_dp.errors import UsageError
from dit_dp.trainer.run import Run
from dit_dp.trainer.world import join_world
from tests.e2e.test_stopped_run import OPTIONS, TIMEOUT_S
from tests.unit.test_trainer import only_run, tiny

ABORTED = 134
"""Exit code of a process that Gloo aborts at its end, since its partner has left, if torchrun sees that first."""

LIMIT = 4096
"""Bytes that a file may have: what a write beyond it says is what a full disk says, of any file."""


def train(folder: Path, *options: str, limit: int | None = None) -> tuple[int, list[str]]:
    """Return the exit code, and what was said but by the log."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = [sys.executable, "-m", "dit_dp.train", *OPTIONS.split(), "--output-dir", str(folder), *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, preexec_fn=limited)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("dit_dp.")]


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "40", "--log-every", "100", "--checkpoint-every", "1000"], "ledger.jsonl: File too large"),
        (["--checkpoint-every", "2"], "checkpoints/step-00000002"),
        (["--weights", "nowhere.pt"], "weights: got 'nowhere.pt'"),
    ],
)
def test_two_processes_say_it_once(tmp_path: Path, options: list[str], said: str) -> None:
    code, lines = train(tmp_path, "--devices", "2", *options, limit=LIMIT)
    if code == ABORTED:  # Gloo's doing, and C++'s words
        lines = [line for line in lines if not line.startswith(("terminate called", "  what():"))]
    assert code in (2, ABORTED), lines
    assert len(lines) == 1, lines
    assert said in lines[0]


@pytest.mark.timeout(TIMEOUT_S)
def test_a_log_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log = tmp_path / "000-DiT-S-2-train" / "log.txt"
    assert train(tmp_path)[0] == 0
    log.unlink()
    log.symlink_to("/dev/full")
    code, lines = train(tmp_path, "--resume", "auto", "--steps", "14")
    assert (code, lines) == (2, [f"dit-dp: error: output_dir: cannot write {log}: No space left on device"])


@pytest.mark.parametrize("file", ["log.txt", "metrics.jsonl"])
def test_steps_that_were_paid_for_are_kept_when_the_disk_is_full(tmp_path: Path, file: str) -> None:
    made = Run(tiny(tmp_path), join_world("cpu"))
    steps = made.steps()
    next(steps)
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - the log's now
    if file == "log.txt":
        before = made._log._files[0].setStream(full)
    else:
        before, made._log._metrics = made._log._metrics, full
    before.close()
    with pytest.raises(UsageError, match=file if file == "log.txt" else "cannot write /dev/full: No space left"):
        next(steps)
    (kept,) = (only_run(tmp_path) / "checkpoints").iterdir()
    assert kept.name == "step-00000002"


def test_a_charge_that_fails_leaves_the_steps_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Run(tiny(tmp_path), join_world("cpu")).steps()
    next(steps)

    def full(file: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_dp.privacy.ledger._append", full)
    with pytest.raises(UsageError, match=r"^ledger: .* No space left on device; nothing may be released"):
        next(steps)
    (kept,) = (only_run(tmp_path) / "checkpoints").iterdir()
    assert kept.name == "step-00000001"
