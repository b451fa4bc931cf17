"""The ledger forgets nothing: killed at any byte, changed in any line, on a full disk, in two processes."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_dp.errors import UsageError
from dit_dp.privacy import Facts, Ledger, Mechanism, Position, epsilon
from dit_dp.privacy import ledger as module

FACTS = Facts(
    dataset="sha256:1", num_units=4000, unit="image", sampling="poisson", noise_multiplier=1.5, sample_rate=0.05
)
SAMPLE = 12


def charge(ledger: Ledger, step: int, **changes: Any) -> None:
    values = {"noise_multiplier": 1.5, "sample_rate": 0.05, "expected_batch_size": 200.0, "max_grad_norm": 1.0}
    ledger.charge(step=step, **{**values, **changes})


def written(path: Path, steps: int) -> bytes:
    """Make a ledger of some steps; return its bytes."""
    with Ledger.open(path, FACTS) as ledger:
        for step in range(steps):
            charge(ledger, step)
    return path.read_bytes()


def test_every_step_is_on_the_disk_when_its_charge_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(module.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, FACTS) as ledger:
        assert synced[0] == path.stat().st_size  # the facts; then the folder, so that the name is there too
        assert len(synced) == 2
        for step in range(3):
            charge(ledger, step, phase="all")
            assert synced[-1] == path.stat().st_size
            assert Ledger.read(path).num_charges == ledger.num_charges == step + 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "charge", "charge", "charge"]
    assert [line["sequence"] for line in lines[1:]] == [1, 2, 3]
    assert [line["phase"] for line in lines[1:]] == ["all"] * 3


def test_lost_steps_stay_charged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path, 5)
    with Ledger.open(path, FACTS) as ledger:
        for step in range(3, 7):  # from a checkpoint before step 3
            charge(ledger, step)
        charge(ledger, 7, noise_multiplier=2.0)
        assert ledger.num_charges == 10
        assert ledger.mechanisms() == [
            Mechanism(noise_multiplier=1.5, sample_rate=0.05, num_steps=9),
            Mechanism(noise_multiplier=2.0, sample_rate=0.05, num_steps=1),
        ]
        nine = epsilon(Mechanism(noise_multiplier=1.5, sample_rate=0.05, num_steps=9), 1e-5)
        assert nine < ledger.spent(1e-5) < 1.2 * nine
    assert Ledger.read(path).spent(1e-5) == ledger.spent(1e-5)


def killed_at(path: Path, whole: bytes, size: int) -> None:
    """A run that died when the file had this size goes on with nothing less charged than there were lines begun."""
    path.write_bytes(whole[:size])
    lines = whole[:size].count(b"\n")
    begun = lines - 1 + (whole[size - 1 : size] != b"\n")
    if lines == 0:  # before the facts were there
        begun = 0
    else:
        looked = Ledger.read(path)
        assert (looked.num_charges, looked.num_torn) == (begun, begun - (lines - 1))
    with Ledger.open(path, FACTS) as ledger:
        assert ledger.num_charges == begun
        assert sum(m.num_steps for m in ledger.mechanisms()) == begun
        charge(ledger, 99)
    again = Ledger.read(path)
    assert again.num_charges == begun + 1
    assert again.mechanisms() == [Mechanism(noise_multiplier=1.5, sample_rate=0.05, num_steps=begun + 1)]


def test_death_at_any_byte(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl", 4)
    sizes = [0, 1, 20, len(whole) - 1, whole.index(b"\n"), whole.index(b"\n") + 1, whole.index(b"\n") + 2]
    for size in sizes + random.Random(0).sample(range(len(whole)), SAMPLE):
        killed_at(tmp_path / "cut.jsonl", whole, size)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_death_at_every_byte(tmp_path: Path, stated: Callable[[str, int], None]) -> None:
    whole = written(tmp_path / "whole.jsonl", 4)
    stated("bytes of a ledger at which its writer died", len(whole))
    for size in range(len(whole)):
        killed_at(tmp_path / "cut.jsonl", whole, size)


def test_death_while_an_unfinished_line_is_closed(tmp_path: Path) -> None:
    whole = written(tmp_path / "ledger.jsonl", 3)
    path = tmp_path / "cut.jsonl"
    path.write_bytes(whole[:-30])
    Ledger.open(path, FACTS).close()
    closed = path.read_bytes()
    for size in range(len(whole) - 29, len(closed), 17):
        path.write_bytes(closed[:size])
        with Ledger.open(path, FACTS) as ledger:
            assert (ledger.num_charges, ledger.num_torn) == (3, 1)
            charge(ledger, 3)
        assert Ledger.read(path).num_charges == 4


def test_an_unfinished_line_is_charged_at_the_dearest_known(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, FACTS) as ledger:
        charge(ledger, 0, noise_multiplier=0.9)
        charge(ledger, 1, sample_rate=0.2)
    path.write_bytes(path.read_bytes() + b'{"kind":"charge","seq')
    dearest = Mechanism(noise_multiplier=0.9, sample_rate=0.2, num_steps=1)
    assert dearest in Ledger.read(path).mechanisms()
    with Ledger.open(path, FACTS) as ledger:
        assert dearest in ledger.mechanisms()


@pytest.mark.parametrize("line", [1, 2, 4])
def test_a_changed_line_is_named(tmp_path: Path, line: int) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = written(path, 4).splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"1.5", b"2.5")
    path.write_bytes(b"".join(lines))
    for look in (lambda: Ledger.read(path), lambda: Ledger.open(path, FACTS)):
        with pytest.raises(UsageError, match=rf"^ledger: line {line} of .*cannot be trusted"):
            look()
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("seed", range(8))
def test_any_flipped_byte_but_in_the_last_line_break_is_an_error(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "ledger.jsonl"
    data = bytearray(written(path, 4))
    at = random.Random(seed).randrange(len(data) - 1)
    data[at] ^= 1 << random.Random(seed).randrange(8)
    path.write_bytes(data)
    number = bytes(data[:at]).count(b"\n") + 1
    with pytest.raises(UsageError, match=rf"^ledger: line ({number}|{number + 1}) of "):
        Ledger.read(path)


def test_a_missing_a_repeated_and_a_swapped_line_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    one, two, three, four, five = written(path, 4).splitlines(keepends=True)
    for lines, number in (
        ([one, two, four, five], 3),
        ([one, two, two, three], 3),
        ([one, three, two, four, five], 2),
        ([two, three], 1),
    ):
        path.write_bytes(b"".join(lines))
        with pytest.raises(UsageError, match=rf"^ledger: line {number} of "):
            Ledger.read(path)


def test_a_ledger_that_was_cut_short_or_replaced_does_not_contain_a_checkpoints_position(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = written(path, 4)
    full = Ledger.read(path)
    early = Position(num_charges=2, chain=json.loads(whole.splitlines()[2])["chain"])
    full.require_contains(early)
    full.require_contains(full.position)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    with pytest.raises(UsageError, match="does not contain the 4 charges"):
        Ledger.read(path).require_contains(full.position)
    path.unlink()
    written(path, 6)  # the same steps, of another run
    with pytest.raises(UsageError, match="does not contain"):
        Ledger.read(path).require_contains(early)


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    before = written(path, 2)
    other = Facts(
        dataset="sha256:2", num_units=4000, unit="image", sampling="poisson", noise_multiplier=1.6, sample_rate=0.1
    )
    with pytest.raises(UsageError) as caught:
        Ledger.open(path, other)
    message = str(caught.value)
    assert (
        "dataset was 'sha256:1', is 'sha256:2'; noise_multiplier was 1.5, is 1.6; sample_rate was 0.05, is 0.1"
        in message
    )
    assert "\n" not in message
    assert "num_units" not in message
    assert path.read_bytes() == before
    Ledger.open(path, FACTS).close()  # the refusal let go of the file


def test_two_processes_cannot_charge_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = (
        "import sys; from pathlib import Path; from dit_dp.privacy import Facts, Ledger\n"
        f"try: Ledger.open(Path(sys.argv[1]), {FACTS!r})\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    with Ledger.open(path, FACTS), pytest.raises(UsageError, match="in use by another process"):
        Ledger.open(path, FACTS)
    with Ledger.open(path, FACTS):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is in use by another process" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


def test_a_forked_child_neither_charges_nor_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, FACTS)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        code = 1
        try:
            charge(ledger, 0)
        except UsageError:
            code = 0
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(code)
    os.read(ready[0], 1)
    ledger.close()
    Ledger.open(path, FACTS).close()
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in (*ready, *go):
        os.close(end)


def test_a_full_disk_is_one_line_and_nothing_more_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path, 2)
    real, left = os.write, [40]

    def write(file: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = real(file, data[: left[0]])
        left[0] -= size
        return size

    with Ledger.open(path, FACTS) as ledger:
        monkeypatch.setattr(module.os, "write", write)
        with pytest.raises(UsageError, match="No space left on device; nothing may be released"):
            charge(ledger, 2)
        left[0] = 10**6
        with pytest.raises(UsageError, match="could not be written"):
            charge(ledger, 2)
    assert Ledger.read(path).num_charges == 3  # the unfinished one counts
    with Ledger.open(path, FACTS) as ledger:
        assert (ledger.num_charges, ledger.num_torn) == (3, 1)


@pytest.mark.parametrize("where", ["missing/ledger.jsonl", "."])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, where: str) -> None:
    with pytest.raises(UsageError, match=r"^ledger: .*(No such file|Is a directory)"):
        Ledger.open(tmp_path / where, FACTS)


@pytest.mark.parametrize("content", [b"a file of somebody else", b"{}\n", b'{"kind":"run"}\nmore\n', b"\n"])
def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"^ledger: "):
        Ledger.open(path, FACTS)
    assert path.read_bytes() == content


def test_no_noise_and_fixed_batches_have_no_epsilon(tmp_path: Path) -> None:
    for facts, words in (
        ({"noise_multiplier": 0.0}, "no privacy"),
        ({"sampling": "shuffled"}, "fixed batches: no epsilon is claimed"),
    ):
        changed = Facts(**{**vars(FACTS), **facts})
        with Ledger.open(tmp_path / words, changed) as ledger:
            charge(ledger, 0, noise_multiplier=changed.noise_multiplier)
            assert ledger.spent(1e-5) == math.inf
            assert str(ledger.statement(1e-5)).startswith(words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", -1.0),
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("expected_batch_size", 0.0),
        ("max_grad_norm", math.inf),
    ],
)
def test_a_charge_out_of_range_is_refused_and_not_written(tmp_path: Path, name: str, value: Any) -> None:
    with Ledger.open(tmp_path / "ledger.jsonl", FACTS) as ledger:
        with pytest.raises(UsageError, match=f"^{name}: got "):
            charge(ledger, **{"step": 0, name: value})
        charge(ledger, 0)
        assert Ledger.read(ledger.path).num_charges == 1


def test_a_closed_ledger_and_one_for_looking_are_not_charged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, FACTS)
    ledger.close()
    for other in (ledger, Ledger.read(path)):
        with pytest.raises(UsageError, match="closed"):
            charge(other, 0)
