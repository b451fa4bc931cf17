"""A comparison file: configurations, and the contenders that meet in each. Read strictly; mistakes name their field."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig, no_budget
from memory_test.core.units import GIB
from memory_test.sweep.grid import make_cell, read_yaml

_KEYS = ("name", "description", "rounds", "settle_steps", "baseline", "base", "configurations", "contenders")
_ENTRY_KEYS = ("label", "method", "memory_budget_of_baseline", "only")
_ELSEWHERE = {
    "experiment": "methods are named under contenders",
    "num_iter": "rounds says how many steps are timed",
    "repeats": "every contender has one process, and rounds says how many steps it takes",
    "memory_budget_gib": "a contender has memory_budget_of_baseline, a multiple of the baseline's peak",
}
"""Fields of `ExperimentConfig` that a comparison says in its own way."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A contender as it was asked for."""

    label: str
    config: ExperimentConfig
    memory_budget_of_baseline: float | None = None

    def with_budget(self, baseline_peak_bytes: int) -> ExperimentConfig:
        """Return its configuration, its budget turned into GiB."""
        if self.memory_budget_of_baseline is None:
            return self.config
        return replace(self.config, memory_budget_gib=self.memory_budget_of_baseline * baseline_peak_bytes / GIB)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A model and a batch, and who meets on it; the baseline first."""

    name: str
    entrants: list[Entrant]

    @property
    def baseline(self) -> Entrant:
        """Whom the others are compared with."""
        return self.entrants[0]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A comparison file.

    Attributes:
        name: What the file calls itself.
        description: One line for the report.
        rounds: Timed rounds.
        settle_steps: Untimed steps at the start of every turn; `None`: 1 on CUDA, where a worker gives its cached
            memory back at the end of its turn, else 0.
        configurations: In the order in which they run.
    """

    name: str
    description: str
    rounds: int
    settle_steps: int | None
    configurations: list[Configuration]


def load_suite(path: Path) -> Suite:
    """Read a comparison file.

    Raises:
        UsageError: Missing file, broken YAML, an unknown key, a value of the wrong type or out of range, a name twice.
    """
    data = read_yaml(path, "comparison", _KEYS)
    rounds, settle = data.get("rounds", 15), data.get("settle_steps")
    validate.integer(f"{path}: rounds", rounds)
    if settle is not None:
        validate.integer(f"{path}: settle_steps", settle, minimum=0)
    base = data.get("base") or {}
    _check_fields(path, "base", base)
    entries = _entries(path, data)
    configurations = [_configuration(path, base, values, entries) for values in _list(path, data, "configurations")]
    names = [configuration.name for configuration in configurations]
    _check_unique(f"{path}: configurations.name", names)
    for entry in entries:
        for name in entry["only"] or ():
            validate.one_of(f"{path}: contenders.only", name, names)
    devices = sorted({c.baseline.config.device for c in configurations})
    if len(devices) > 1:
        raise UsageError.for_value(f"{path}: device", ", ".join(devices), "one device", "write a file for each")
    return Suite(
        name=str(data.get("name", path.stem)),
        description=str(data.get("description", "")),
        rounds=rounds,
        settle_steps=settle,
        configurations=configurations,
    )


def _entries(path: Path, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the baseline and the contenders as mappings with every key of `_ENTRY_KEYS`."""
    baseline = data.get("baseline", "vanilla")
    validate.one_of(f"{path}: baseline", baseline, METHODS)
    made: list[dict[str, Any]] = []
    for entry in [baseline, *_list(path, data, "contenders")]:
        given = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict):
            raise UsageError.for_value(f"{path}: contenders", entry, "a method, or a mapping with method")
        for key in given:
            validate.one_of(f"{path}: contenders key", key, _ENTRY_KEYS)
        whole = {**dict.fromkeys(_ENTRY_KEYS), **given}
        validate.one_of(f"{path}: contenders.method", whole["method"], METHODS)
        whole["label"] = str(whole["label"] or whole["method"])
        if whole["only"] is not None and not isinstance(whole["only"], list):
            raise UsageError.for_value(f"{path}: contenders.only", whole["only"], "a list of configuration names")
        _check_budget(path, whole)
        made.append(whole)
    fix = f"the baseline, {baseline}, enters by itself; a method that enters twice needs labels"
    _check_unique(f"{path}: contenders.label", [entry["label"] for entry in made], fix)
    return made


def _check_budget(path: Path, entry: dict[str, Any]) -> None:
    budget = entry["memory_budget_of_baseline"]
    if budget is None:
        return
    name = f"{path}: contenders.memory_budget_of_baseline"
    validate.real(name, budget, positive=True)
    if not METHODS[entry["method"]].takes_memory_budget:
        raise UsageError.for_value(name, budget, "None", no_budget(entry["method"]))


def _configuration(path: Path, base: dict[str, Any], values: Any, entries: list[dict[str, Any]]) -> Configuration:
    if not isinstance(values, dict):
        raise UsageError.for_value(f"{path}: configurations", values, "a mapping with a name")
    own = dict(values)
    name = own.pop("name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UsageError.for_value(
            f"{path}: configurations.name", name, "letters, digits, '.', '_' and '-'", "it names a file"
        )
    _check_fields(path, f"configurations.{name}", own)
    entrants = [
        Entrant(
            label=entry["label"],
            config=make_cell(path, {**base, **own, "experiment": entry["method"]}),
            memory_budget_of_baseline=entry["memory_budget_of_baseline"],
        )
        for entry in entries
        if entry["only"] is None or name in entry["only"]
    ]
    return Configuration(name=name, entrants=entrants)


def _check_fields(path: Path, where: str, values: Any) -> None:
    """Refuse what is not a mapping, and fields that have another place."""
    if not isinstance(values, dict):
        raise UsageError.for_value(f"{path}: {where}", values, "a mapping of field to value")
    for name, reason in _ELSEWHERE.items():
        if name in values:
            raise UsageError(f"{path}: {where}.{name}: got {values[name]!r}; accepted: nothing; {reason}")


def _list(path: Path, data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list) or not value:
        raise UsageError.for_value(f"{path}: {key}", value, "a list with at least one entry")
    return value


def _check_unique(name: str, values: list[str], fix: str | None = None) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UsageError.for_value(name, value, "each name once", fix)
