"""Run a sweep: resume what is done, refuse to mix environments, keep every finished cell whatever happens."""

import dataclasses
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
    """What a sweep has to do in a folder; `stop_at_oom` as in `Sweep`."""

    cells: list[Cell]
    environment: Environment
    stop_at_oom: str | None = None

    @property
    def pending(self) -> list[Cell]:
        """Cells without a record that do not lie beyond the edge."""
        ends = _Ends(self)
        return [cell for cell in self.cells if cell.done is None and not ends.passed(cell.config)]


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
    return Plan(cells=cells, environment=environment, stop_at_oom=sweep.stop_at_oom)


def run(
    plan: Plan,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    permit: Callable[[Cell], float | None] = lambda cell: cell.config.timeout_s,
) -> Iterator[tuple[Cell, Record]]:
    """Run what is pending, one process at a time; yield each cell with its record, saved.

    A cell beyond the edge (`Plan.stop_at_oom`) is left out: it has no record.

    Args:
        plan: From `prepare`.
        on_cell: Told of each cell before it runs.
        permit: Asked before a cell runs how long (s) it may take; `None` ends the run. A cell that is cut short by
            this, and not by its own limit, leaves no record and ends the run too.
    """
    ends = _Ends(plan)
    for cell in plan.cells:
        if cell.done is not None:
            yield cell, cell.done
            continue
        if ends.passed(cell.config):
            continue
        seconds = permit(cell)
        if seconds is None:
            return
        on_cell(cell)
        limit = min(seconds, cell.config.timeout_s)
        record = run_cell(dataclasses.replace(cell.config, timeout_s=limit), usage_is_error=True)
        if record.status == "timeout" and limit < cell.config.timeout_s:
            return
        record = dataclasses.replace(record, config_requested=cell.config.as_dict())
        store.save_measured(record, cell.path)
        ends.note(cell.config, record)
        yield cell, record


class _Ends:
    """Where memory or time ran out along a field, by all other fields."""

    def __init__(self, plan: Plan) -> None:
        self._axis = plan.stop_at_oom
        self._first: dict[str, float] = {}
        for cell in plan.cells:
            if cell.done is not None:
                self.note(cell.config, cell.done)

    def note(self, config: ExperimentConfig, record: Record) -> None:
        """Take notice of what a cell ended in."""
        if self._axis is not None and record.status in ("oom", "timeout"):
            others, value = self._place(config)
            self._first[others] = min(value, self._first.get(others, value))

    def passed(self, config: ExperimentConfig) -> bool:
        """Return whether a smaller cell ran out already."""
        if self._axis is None:
            return False
        others, value = self._place(config)
        return value > self._first.get(others, value)

    def _place(self, config: ExperimentConfig) -> tuple[str, float]:
        fields = config.as_dict()
        value = float(fields.pop(str(self._axis)))
        return json.dumps(fields, sort_keys=True, default=str), value


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
