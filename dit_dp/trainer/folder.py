"""The folder of a run: ``NNN-MODEL-WORKLOAD-...``, its log for people and its numbers for programs."""

import contextlib
import datetime
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_dp.errors import UsageError
from dit_dp.files import write_whole
from dit_dp.privacy.statement import rounded_up
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.price import is_bound
from dit_dp.workloads import WorkloadSpec

log = logging.getLogger(__name__)

NOT_PRIVATE = (
    "Loss, validation loss of held-out images, norms and numbers of units are computed from the training data and not "
    "covered by epsilon: to publish them is a release of its own"
)
"""Said at the head of every log."""


def run_label(config: TrainConfig, spec: WorkloadSpec) -> str:
    """Return the name of a run without its number: ``DiT-XL-2-x2-finetune``."""
    model = re.sub(r"[^A-Za-z0-9]+", "-", Path(spec.model).name if not spec.workload.sizes else spec.model).strip("-")
    words = [model]
    if config.workload.lower() not in model.lower():
        words.append(config.workload)
    words.append("train" if spec.train == "full" and config.weights is None else "finetune")
    return "-".join(words)


def new_run(parent: Path, label: str) -> Path:
    """Make the folder of a new run, with the next number.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{_next_number(parent):03d}-{label}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue  # somebody else took the number
            return folder
    except OSError as error:
        raise UsageError(f"output_dir: cannot make a run in {parent}: {error.strerror or error}") from error


def newest_run(parent: Path, label: str) -> Path | None:
    """Return the run of this label with the largest number, or `None`."""
    found = [(number, path) for number, path in _numbered(parent) if path.name.partition("-")[2] == label]
    return max(found)[1] if found else None


def _numbered(parent: Path) -> list[tuple[int, Path]]:
    if not parent.is_dir():
        return []
    return [(int(path.name.partition("-")[0]), path) for path in parent.iterdir() if re.match(r"\d{3,}-", path.name)]


def _next_number(parent: Path) -> int:
    return max((number for number, _ in _numbered(parent)), default=-1) + 1


class _LogFile(logging.FileHandler):
    """A log's file that keeps the first error of the system for later, where logging would print each of them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.path = path
        self.failure: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.failure is None:
            self.failure = error


class RunLog:
    """Writes ``log.txt``, as people read it, and ``metrics.jsonl``, one line of JSON a step that is logged.

    Args:
        folder: Of the run; `None`: of a process that does not lead, which writes nothing.

    Raises:
        UsageError: They cannot be written; here, and by `line` and `check`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: list[_LogFile] = []
        self._metrics = None
        if folder is None:
            return
        try:
            handler = _LogFile(folder / "log.txt")
            self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"output_dir: cannot write in {folder}: {error.strerror or error}") from error
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        root = logging.getLogger("dit_dp")
        self._level_before = root.level
        root.addHandler(handler)
        root.setLevel(min(logging.INFO, root.level or logging.INFO))
        self._files.append(handler)

    def line(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write the numbers of a step: ``(step=0000100) Train Loss: 0.1234, Epsilon: 0.1732 (delta 1e-05), ...``."""
        if self._metrics is None:
            return
        text = ", ".join(_spelled(name, values) for name in values if name in _SPELLED)
        mode = values.get("training_mode")
        log.info("(step=%07d) %s%s", step, text, f", {mode}" if mode not in (None, "FULL") else "")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with naming(self._metrics.name):
            self._metrics.write(json.dumps({"step": step, "time": now, **values}) + "\n")
            self._metrics.flush()
        self.check()

    def check(self) -> None:
        """Raise `UsageError` if anything that was logged so far is not in ``log.txt``."""
        for handler in self._files:
            if handler.failure is not None:
                with naming(handler.path):
                    raise handler.failure

    def close(self) -> None:
        """Close both files; what cannot be written now could not be when it was, and was said then."""
        root = logging.getLogger("dit_dp")
        for handler in self._files:
            root.removeHandler(handler)
            root.setLevel(self._level_before)
            with contextlib.suppress(OSError):
                handler.close()
        if self._metrics is not None:
            with contextlib.suppress(OSError):
                self._metrics.close()


_SPELLED = {
    "loss": "Train Loss",
    "steps_per_s": "Train Steps/Sec",
    "examples_per_s": "Examples/Sec",
    "epsilon": "Epsilon",
    "validation_loss": "Validation Loss",
    "learning_rate": "LR",
    "peak_memory_gib": "Peak GiB",
}


def _spelled(name: str, values: Mapping[str, Any]) -> str:
    """Return a number of a step as people read it."""
    if name == "epsilon":
        bound = "at most " if is_bound(values) else ""
        return f"{_SPELLED[name]}: {bound}{rounded_up(values[name])} (delta {values['delta']:g})"
    return f"{_SPELLED[name]}: {values[name]:.4g}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees all of it or nothing.

    Raises:
        UsageError: It cannot be written.
    """
    with naming(path):
        write_whole(path, json.dumps(content, indent=1).encode())


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Turn what the system says of a file of the run into a `UsageError` that names it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"output_dir: cannot write {path}: {error.strerror or error}") from error
