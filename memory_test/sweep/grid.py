"""A sweep file: a base, a grid of values, cells to leave out. Read strictly; every mistake names its field."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig

_FIELDS = {f.name: f for f in dataclasses.fields(ExperimentConfig)}
_KEYS = ("name", "description", "base", "grid", "exclude", "cells", "stop_at_oom")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A named list of cells, in the order in which they run.

    Attributes:
        name: What the file calls itself.
        description: One line for people.
        cells: What is measured.
        stop_at_oom: Field, such as ``batch_size``, along which nothing is tried beyond the first cell that ran out of
            memory or of time, everything else being equal.
    """

    name: str
    description: str = ""
    cells: list[ExperimentConfig] = field(default_factory=list)
    stop_at_oom: str | None = None


SHIPPED = Path(__file__).resolve().parents[1] / "sweeps"


def find_sweep(name: Path) -> Path:
    """Return a sweep file: a path, or the name of one that is shipped, such as ``demo``."""
    shipped = SHIPPED / f"{name}.yaml"
    return shipped if not name.exists() and name.name == str(name) and shipped.exists() else name


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    The cells are the product of ``grid`` over ``base``, the last key varying fastest, without those that match
    an entry of ``exclude``, and then those of ``cells``, each over ``base``. An entry of ``exclude`` may list several
    values of a field. ``stop_at_oom`` names a field of ``grid`` whose values increase.

    Raises:
        UsageError: Missing file, broken YAML, an unknown key, a value of the wrong type or out of range, no cell.
    """
    data = read_yaml(path, "sweep", _KEYS)
    base, grid = _mapping(path, data, "base"), _mapping(path, data, "grid")
    excluded, extra = _list(path, data, "exclude"), _list(path, data, "cells")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError.for_value(f"{path}: grid.{key}", values, "a list of values")
    product = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    kept = [cell for cell in product if not any(_matches(entry, {**base, **cell}) for entry in excluded)]
    cells = [make_cell(path, {**base, **cell}) for cell in [*kept, *extra]]
    if not cells:
        raise UsageError.for_value("sweep", str(path), "at least one cell", "give grid, or cells")
    devices = sorted({cell.device for cell in cells})
    if len(devices) > 1:
        raise UsageError.for_value(f"{path}: device", ", ".join(devices), "one device", "write a sweep for each")
    return Sweep(
        name=str(data.get("name", path.stem)),
        description=str(data.get("description", "")),
        cells=cells,
        stop_at_oom=_axis(path, data.get("stop_at_oom"), grid),
    )


def read_yaml(path: Path, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        name: What messages call such a file.
        keys: The keys it may hold at the top.

    Raises:
        UsageError: Missing file, broken YAML, not a mapping, an unknown key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError.for_value(name, str(path), "a readable YAML file", error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError.for_value(name, str(path), "valid YAML", " ".join(str(error).split())) from error
    if not isinstance(data, dict):
        raise UsageError.for_value(name, str(path), f"a mapping of {', '.join(keys)}")
    for key in data:
        if key not in keys:
            raise UsageError.for_value(f"{path}: key", key, keys)
    return data


def make_cell(path: Path, values: dict[str, Any]) -> ExperimentConfig:
    """Build one cell, checking names and types as strictly as the command line does."""
    for name, value in values.items():
        if name not in _FIELDS:
            raise UsageError.for_value(f"{path}: field", name, _FIELDS)
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", value, re.IGNORECASE):
            raise UsageError.for_value(
                f"{path}: {name}", value, "a number", "YAML reads 1e-4 as text; write 1.0e-4 instead"
            )
    if "experiment" not in values:
        raise UsageError.for_value(f"{path}: experiment", None, "a method", "put it into base or grid")
    try:
        cell: ExperimentConfig = _adapter().validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UsageError):
            raise UsageError(f"{path}: {cause}") from None
        where = ".".join(str(part) for part in first["loc"][:1])
        raise UsageError.for_value(f"{path}: {where}", first["input"], first["msg"]) from None
    return cell


@cache
def _adapter() -> "TypeAdapter[ExperimentConfig]":
    return TypeAdapter(ExperimentConfig)


def _mapping(path: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise UsageError.for_value(f"{path}: {key}", value, "a mapping of field to value")
    return value


def _list(path: Path, data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = data.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UsageError.for_value(f"{path}: {key}", value, "a list of mappings")
    for entry in value:
        for name in entry:
            if name not in _FIELDS:
                raise UsageError.for_value(f"{path}: {key} field", name, _FIELDS)
    return value


def _matches(entry: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Return whether a cell has the values of an entry, or one of those that it lists."""

    def agrees(got: Any, wanted: Any) -> bool:
        return bool(got == wanted) or (isinstance(wanted, list) and got in wanted)

    return all(agrees(cell.get(name), value) for name, value in entry.items())


def _axis(path: Path, name: Any, grid: dict[str, Any]) -> str | None:
    """Return the field along which a sweep stops; refuse one whose values do not increase."""
    if name is None:
        return None
    values = grid.get(name, []) if isinstance(name, str) else []
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if not values or numbers != values or sorted(set(numbers)) != numbers:
        raise UsageError.for_value(f"{path}: stop_at_oom", name, "a field of grid whose numbers increase")
    return str(name)
