"""What passes between the runner and its worker: a request, a header, an answer; JSON files and one mapped line."""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PHASE_BYTES = 64


@dataclass(frozen=True)
class Exchange:
    """The files of one worker, in a folder of its own."""

    folder: Path

    @property
    def request(self) -> Path:
        """What to measure; written by the runner."""
        return self.folder / "request.json"

    @property
    def header(self) -> Path:
        """Environment and resolved configuration; written by the worker before it measures."""
        return self.folder / "header.json"

    @property
    def answer(self) -> Path:
        """The result or the caught failure; written by the worker at its end."""
        return self.folder / "answer.json"

    @property
    def phase(self) -> Path:
        """Where the worker is; readable after it was killed."""
        return self.folder / "phase"

    @property
    def stderr(self) -> Path:
        """What the worker wrote."""
        return self.folder / "stderr"


def write_json(path: Path, data: Any) -> None:
    """Write a file that is whole or absent."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data), encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Return a file's content, or `None` if it is absent."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class PhaseLine:
    """A line of text in shared memory: setting it costs less than a microsecond, so it may sit in timed code."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b" " * _PHASE_BYTES)
        with path.open("r+b") as handle:
            self._memory = mmap.mmap(handle.fileno(), _PHASE_BYTES)

    def set(self, text: str) -> None:
        """Say where the worker is."""
        self._memory[:] = text.encode()[:_PHASE_BYTES].ljust(_PHASE_BYTES)

    @staticmethod
    def read(path: Path) -> str | None:
        """Return what was said last, or `None`."""
        return path.read_bytes().decode(errors="replace").strip() or None if path.exists() else None
