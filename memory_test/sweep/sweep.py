"""Run a sweep: resume what is done, refuse to mix environments, keep every finished cell whatever happens."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import Environment, Record
from memory_test.sweep.grid import Sweep
from memory_test.sweep.process import default_threads
from memory_test.sweep.runner import config_digest, probe, run_cell

OnMismatch = Literal["refuse", "rerun"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell with its file and, if it was finished earlier, its record."""

    config: ExperimentConfig
    path: Path
    done: Record | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep has to do in a folder."""

    cells: list[Cell]
    environment: Environment

    @property
    def pending(self) -> list[Cell]:
        """Cells without a record."""
        return [cell for cell in self.cells if cell.done is None]


def prepare(sweep: Sweep, folder: Path, on_mismatch: OnMismatch = "refuse", retry_failed: bool = False) -> Plan:
    """Compare a sweep with what is in its folder.

    Args:
        sweep: The cells.
        folder: Where records are; created if its parent exists.
        on_mismatch: What to do with records of these cells from another environment.
        retry_failed: Whether cells that ended otherwise than ok or oom are run again.

    Raises:
        UsageError: The folder cannot be written to, or holds records of another environment.
    """
    check_folder(folder)
    environment, resolved = probe(sweep.cells[0])
    make_folder(folder)
    cells = []
    for config in sweep.cells:
        path = folder / file_name(config, resolved["device"])
        record = store.load(path) if path.exists() else None
        if record is not None and not _comparable(record, environment, path, on_mismatch):
            record = None
        if record is not None and retry_failed and record.status not in ("ok", "oom"):
            record = None
        cells.append(Cell(config=config, path=path, done=record))
    return Plan(cells=cells, environment=environment)


def run(plan: Plan, on_cell: Callable[[Cell], None] = lambda cell: None) -> Iterator[tuple[Cell, Record]]:
    """Run what is pending, one process at a time; yield each cell with its record, saved.

    Args:
        plan: From `prepare`.
        on_cell: Told of each cell before it runs.
    """
    for cell in plan.cells:
        if cell.done is not None:
            yield cell, cell.done
            continue
        on_cell(cell)
        record = run_cell(cell.config, usage_is_error=True)
        store.save_measured(record, cell.path)
        yield cell, record


def file_name(config: ExperimentConfig, device: str) -> str:
    """Return the cell's file name: readable, and unique by its resolved configuration."""
    resolved = config.resolve(device=device, num_threads=default_threads())
    size = [] if config.is_custom else [f"{resolved['image_size']}px"]
    parts = [config.experiment, config.file_label, *size, f"b{config.batch_size}", config.dtype]
    return "-".join([*parts, config_digest(resolved)[:8]]) + ".json"


def check_folder(folder: Path) -> None:
    """Raise `UsageError` unless `folder` is one or could be made."""
    if not folder.parent.is_dir():
        raise UsageError.for_value("output_dir", str(folder), "a folder whose parent exists", f"mkdir -p {folder}")
    if folder.exists() and not folder.is_dir():
        raise UsageError.for_value("output_dir", str(folder), "a folder", "this is a file")


def make_folder(folder: Path) -> None:
    """Create a folder that `check_folder` let pass; raise `UsageError` unless files can be written to it."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError.for_value("output_dir", str(folder), "a writable folder", error.strerror) from error
    store.check_writable(folder / "record.json", "output_dir")


def _comparable(record: Record, environment: Environment, path: Path, on_mismatch: OnMismatch) -> bool:
    """Return whether a record may stand beside new ones; raise or tell to rerun if not."""
    if record.environment is None:
        return False  # its worker died before it could say where it ran
    return same_environment(record.environment, environment, path, on_mismatch)


def same_environment(measured_in: Environment, environment: Environment, path: Path, on_mismatch: OnMismatch) -> bool:
    """Return whether a file's environment is this one; if it is not, raise unless `on_mismatch` says to rerun."""
    then, now = measured_in.identity(), environment.identity()
    changed = [name for name in now if then[name] != now[name]]
    if not changed:
        return True
    if on_mismatch == "rerun":
        return False
    name = changed[0]
    raise UsageError(
        f"output_dir: {path} was measured with {name}={_short(then[name])}, now it is {_short(now[name])}; accepted: "
        f"records of one environment; choose another --output-dir, or --on-mismatch rerun to measure them again"
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
