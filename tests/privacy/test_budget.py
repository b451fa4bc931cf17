"""``dit-dp budget``: any one unknown of three, and what is wrong in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dit_dp.cli import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ("--delta", "1e-5", "--dataset-size", "4000", "--batch-size", "200")


def budget(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[float, int, float]:
    """Return (noise multiplier, steps, epsilon) as printed."""
    assert main(["budget", *arguments]) == 0
    out = capsys.readouterr().out
    for words in ("delta 1e-05", "unit: image, 4000", "neighbours: add or remove one unit", "sampling: Poisson"):
        assert words in out
    found = re.search(r"noise multiplier: (\S+)\nsteps: (\d+) .*\nsample rate: 0.05 .*\nepsilon (\S+),", out)
    assert found, out
    return float(found[1]), int(found[2]), float(found[3])


def test_the_third_is_found_from_any_two(capsys: pytest.CaptureFixture[str]) -> None:
    sigma, steps, epsilon = budget(capsys, *DATA, "--epsilon", "1", "--steps", "100")
    assert steps == 100
    assert 0.99 < epsilon <= 1
    assert budget(capsys, *DATA, "--noise-multiplier", str(sigma), "--steps", "100")[2] == pytest.approx(epsilon, 1e-3)
    assert 100 <= budget(capsys, *DATA, "--epsilon", "1", "--noise-multiplier", str(sigma + 1e-5))[1] < 102


def test_epochs_and_a_sample_rate_are_other_words_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--delta", "1e-5", "--dataset_size", "4000", "--sample_rate", "0.05", "--noise_multiplier", "1.5")
    assert budget(capsys, *words, "--epochs", "5") == budget(capsys, *DATA, *words[-2:], "--steps", "100")


def test_no_noise_is_no_privacy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", *DATA, "--noise-multiplier", "0", "--steps", "10"]) == 0
    assert "no privacy" in capsys.readouterr().out


def test_a_delta_of_one_over_n_is_warned_of(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--delta", "1e-3", *DATA[2:], "--noise-multiplier", "2", "--steps", "10")
    assert main(["budget", *words]) == 0
    assert "promises nothing" in capsys.readouterr().out
    assert "a promise needs delta well below" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "missing: "),
        ((*DATA, "--epsilon", "10"), "two of the three"),
        ((*DATA, "--epsilon", "10", "--steps", "10", "--noise-multiplier", "1"), "two of the three"),
        ((*DATA, "--epsilon", "10", "--steps", "10", "--epochs", "1"), "steps, epochs: got both"),
        ((*DATA, "--sample-rate", "0.1", "--epsilon", "10", "--steps", "10"), "batch_size, sample_rate: got both"),
        ((*DATA[:4], "--epsilon", "10", "--steps", "10"), "batch_size, sample_rate: got neither"),
        ((*DATA[:4], "--batch-size", "4001", "--epsilon", "10", "--steps", "10"), "batch_size: got 4001"),
        (("--delta", "1e-5", "--dataset-size", "0", "--batch-size", "1", "--steps", "1"), "dataset_size: got 0"),
        ((*DATA, "--epsilon", "-1", "--steps", "10"), "epsilon: got -1.0"),
        ((*DATA, "--epsilon", "nan", "--steps", "10"), "epsilon: got nan"),
        ((*DATA, "--epsilon", "1", "--epochs", "nan"), "epochs: got nan"),
        ((*DATA, "--epsilon", "1", "--noise-multiplier", "0.001"), "noise_multiplier: got 0.001"),
        ((*DATA, "--epsilon", "0.001", "--noise-multiplier", "1.5"), "a budget for at least one step"),
        (("--delta", "2", *DATA[2:], "--epsilon", "1", "--steps", "10"), "delta: got 2.0"),
        ((*DATA, "--epsilonn", "1"), "epsilonn"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    assert main(["budget", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dit-dp: error: ")
    assert words in captured.err


def test_an_unknown_command_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bugdet"]) == 2
    assert "accepted: train, sample, evaluate, budget" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("budget",)])
def test_help_needs_no_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)));"
        f"from dit_dp.cli import main; main([*{arguments!r}, '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert "usage" in done.stdout
    assert done.stderr.endswith("False")
