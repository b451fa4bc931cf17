"""What a run has released, on disk before it is released: a file that is only ever appended to, and never forgets.

A step is charged, and the charge is on the disk, before its noised gradient exists. Whatever happens then, an
interrupted run has charged at least what it released; a run that resumes from an older checkpoint takes the lost steps
again and pays for them again, since what they released may have been seen.

JSON lines. The first is the run's facts, every other one a charge. The last key of each, ``chain``, is the SHA-256 of
the previous line's chain and this line's other bytes, so that a changed, missing or reordered line is found. Against
someone who writes the whole file anew it is no protection; checkpoints keep a `Position`, which finds that too. A last
line that was being written when the process died is a charge: it never was on the disk in full, so nothing was released
for it, but counting it is the safe side. It is closed, not removed, when the ledger is next opened.
"""

import dataclasses
import fcntl
import hashlib
import math
import os
import secrets
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dit_dp.errors import UsageError
from dit_dp.privacy.accounting import Mechanism, epsilon_of
from dit_dp.privacy.entries import SCHEMA_VERSION, TORN, Charge, Content, Facts, Position, chain_of, line_of, parse
from dit_dp.privacy.statement import PrivacyStatement

_HEAD = b'{"kind":"run"'


class Ledger:
    """The releases of one run. Made by `open` or `read`, not directly.

    Attributes:
        path: The file.
        facts: The run's.
        num_charges: Releases charged, lost and unfinished ones included.
        num_torn: Those of them whose line was not finished.

    A ledger that is open belongs to one process; of several ranks the first keeps it. Use it as a context, or `close`.
    """

    def __init__(self, path: Path, content: Content, file: int | None) -> None:
        self.path = path
        self._content = content
        self._file = file
        self._broken = False
        self._owner = os.getpid()

    @classmethod
    def open(cls, path: Path, facts: Facts) -> "Ledger":
        """Make a ledger, or go on with one.

        Args:
            path: The file; its folder exists.
            facts: Of the run that will be charged.

        Raises:
            UsageError: Another process has it open, it cannot be written, a line was changed or is missing, or it
                belongs to another run.
        """
        with _one_line(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"ledger: {path} is in use by another process; wait for it to end") from None
            with _one_line(path):
                ledger = cls._open(path, facts, file)
        except BaseException:
            os.close(file)
            raise
        _OPEN.add(ledger)
        return ledger

    @classmethod
    def _open(cls, path: Path, facts: Facts, file: int) -> "Ledger":
        data = _read_all(file)
        begun = data[: len(_HEAD)] == _HEAD[: len(data)]
        if b"\n" not in data and begun:  # new, or its maker died before the facts were on the disk, so before a charge
            os.ftruncate(file, 0)
            head = {"kind": "run", "schema_version": SCHEMA_VERSION, "run": secrets.token_hex(16)}
            data = line_of({**head, **dataclasses.asdict(facts)}, "")
            _append(file, data)
            _sync_folder(path.parent)
        content = parse(path, data)
        ledger = cls(path, content, file)
        ledger.require_same(facts)
        if content.rest:
            ledger._close_torn()
        return ledger

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Return a ledger for looking at; nothing is locked, and it cannot be charged.

        Raises:
            UsageError: It cannot be read, or a line was changed or is missing.
        """
        with _one_line(path):
            return cls(path, parse(path, path.read_bytes()), None)

    @property
    def facts(self) -> Facts:
        """The run's facts."""
        return self._content.facts

    @property
    def num_charges(self) -> int:
        """Releases charged, lost and unfinished ones included."""
        return len(self._content.chains) - 1 + bool(self._content.rest)

    @property
    def num_torn(self) -> int:
        """Charges whose line was not finished."""
        return self._content.num_torn + bool(self._content.rest)

    @property
    def position(self) -> Position:
        """Where the ledger is now, for a checkpoint."""
        return Position(num_charges=len(self._content.chains) - 1, chain=self._content.chains[-1])

    def charge(
        self,
        *,
        step: int,
        noise_multiplier: float,
        sample_rate: float,
        expected_batch_size: float,
        max_grad_norm: float,
        phase: str = "",
    ) -> None:
        """Charge a release, before it is made. When this returns, the charge is on the disk.

        Args:
            step: The optimizer's step, from 0.
            noise_multiplier: sigma.
            sample_rate: q.
            expected_batch_size: The divisor.
            max_grad_norm: C.
            phase: Of training.

        Raises:
            UsageError: A value is out of range; the disk is full or gone; the ledger is closed, was opened for
                looking, belongs to another process, or failed before. The release must not be made.
        """
        charge = Charge(
            step=step,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            max_grad_norm=max_grad_norm,
            phase=phase,
        )
        self._write("charge", charge)

    def mechanisms(self) -> list[Mechanism]:
        """Return the composition of everything charged, in groups of equal noise and sampling."""
        counts = Counter(self._content.counts)
        if self._content.rest:
            counts[self._dearest()] += 1
        return [
            Mechanism(noise_multiplier=sigma, sample_rate=rate, num_steps=count)
            for (sigma, rate), count in sorted(counts.items())
        ]

    def spent(self, delta: float) -> float:
        """Return the epsilon of everything charged; infinite without noise, and for fixed batches, whose is unknown.

        Raises:
            UsageError: delta is out of range.
        """
        return math.inf if self.facts.sampling != "poisson" else epsilon_of(self.mechanisms(), delta)

    def statement(self, delta: float) -> PrivacyStatement:
        """Return what may be said of everything charged."""
        return PrivacyStatement(
            mechanisms=tuple(self.mechanisms()),
            delta=delta,
            unit=self.facts.unit,
            num_units=self.facts.num_units,
            sampling=self.facts.sampling,
        )

    def require_same(self, facts: Facts) -> None:
        """Refuse to charge one run to another's ledger.

        Raises:
            UsageError: Any fact differs; the message names each, with both values.
        """
        old, new = dataclasses.asdict(self.facts), dataclasses.asdict(facts)
        different = [f"{name} was {old[name]!r}, is {new[name]!r}" for name in old if old[name] != new[name]]
        if different:
            fix = "go on with the values it was begun with, or begin a new run in another folder"
            raise UsageError(f"ledger: {self.path} belongs to another run: {'; '.join(different)}; {fix}")

    def require_contains(self, position: Position) -> None:
        """Refuse a checkpoint whose releases this ledger does not know of.

        Raises:
            UsageError: The position is not one of this ledger's: it was cut short, replaced, or is another run's.
        """
        chains = self._content.chains
        if not 0 <= position.num_charges < len(chains) or chains[position.num_charges] != position.chain:
            raise UsageError(
                f"ledger: {self.path} does not contain the {position.num_charges} charges that the checkpoint has "
                "seen: it was cut short, or belongs to another run; bring back the ledger of this run"
            )

    def close(self) -> None:
        """Let go of the file; the ledger can still be asked."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, kind: Literal["charge", "torn"], charge: Charge, prefix: bytes = b"", **more: object) -> None:
        if self._file is None or self._owner != os.getpid():
            raise UsageError("ledger: it is closed, or was opened by another process; open it in this one")
        if self._broken:
            raise UsageError("ledger: an earlier charge could not be written; start the run again")
        payload = {"kind": kind, "sequence": len(self._content.chains), **dataclasses.asdict(charge), **more}
        line = line_of(payload, self._content.chains[-1])
        self._broken = True
        with _one_line(self.path):
            _append(self._file, prefix + line)
        self._broken = False
        self._content.add(charge, chain_of(line), torn=kind == "torn")

    def _close_torn(self) -> None:
        """Finish an unfinished line with an entry of its own, charged at the dearest that is known."""
        sigma, rate = self._dearest()
        charge = Charge(step=None, noise_multiplier=sigma, sample_rate=rate, expected_batch_size=0.0, max_grad_norm=0.0)
        digest = hashlib.sha256(self._content.rest).hexdigest()
        self._write("torn", charge, prefix=TORN, unfinished_sha256=digest)
        self._content.rest = b""

    def _dearest(self) -> tuple[float, float]:
        """Return the least noise and the highest rate that the ledger knows of."""
        known = [(self.facts.noise_multiplier, self.facts.sample_rate), *self._content.counts]
        return min(sigma for sigma, _ in known), max(rate for _, rate in known)


# --- the file -----------------------------------------------------------------------------------------------------


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what the system says of the file into the user's mistake."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"ledger: {path}: {reason}; nothing may be released without a charge on the disk") from None


def _read_all(file: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as stream:
        stream.seek(0)
        return stream.read()


def _append(file: int, data: bytes) -> None:
    """Write at the end, and return when it is on the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    """Have the disk know that a new file is in its folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OPEN: "weakref.WeakSet[Ledger]" = weakref.WeakSet()


def _after_fork() -> None:
    """Let go of ledgers in a forked child, which would keep them locked when it outlives this process."""
    for ledger in list(_OPEN):
        ledger.close()


os.register_at_fork(after_in_child=_after_fork)
