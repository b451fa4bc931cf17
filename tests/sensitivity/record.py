"""The record that `make test-full` leaves: how many cases, which methods, and how close to each bound they came."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_test.core import environment, store
from memory_test.doctor.facts import Diagnosis

SCHEMA_VERSION = 1
PATH = Path(__file__).resolve().parents[2] / "results" / "sensitivity" / "record.json"


@dataclass(frozen=True, kw_only=True)
class SensitivityRecord:
    """What the random cases showed.

    Attributes:
        first_seed: Of the first case; the others follow.
        num_cases: How many random cases each method was examined on.
        methods: Methods examined.
        worst_margins: By method (and ``model``) and check the largest measured number over its bound; 1 is the bound.
        failures: One line for each check that did not pass.
        layer_kinds: How often each layer kind occurred in the cases.
        environment: Where it ran, commit included.
    """

    schema_version: int = SCHEMA_VERSION
    first_seed: int
    num_cases: int
    methods: tuple[str, ...]
    worst_margins: dict[str, dict[str, float]]
    failures: tuple[str, ...]
    layer_kinds: dict[str, int]
    environment: dict[str, Any]


@dataclass
class Tally:
    """Adds up what cases show."""

    margins: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, seed: int, diagnoses: Iterable[Diagnosis]) -> None:
        """Take the findings of one case."""
        for diagnosis in diagnoses:
            margins = self.margins.setdefault(diagnosis.subject, {})
            for check in diagnosis.checks:
                if check.status == "passed":
                    margins[check.name] = max(margins.get(check.name, 0.0), check.margin)
                else:
                    line = f"seed {seed}, {diagnosis.subject}, {check.name}: {check.status}"
                    self.failures.append(f"{line}, {check.measured} where {check.bound} may be: {check.explanation}")

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it, and as workers can hand it on: `dataclasses.asdict` would count pairs."""
        return {"margins": self.margins, "failures": self.failures, "kinds": dict(self.kinds)}

    def merge(self, other: dict[str, Any]) -> None:
        """Take another tally, as `plain` gives it."""
        for subject, found in other["margins"].items():
            margins = self.margins.setdefault(subject, {})
            for check, margin in found.items():
                margins[check] = max(margins.get(check, 0.0), margin)
        self.failures += other["failures"]
        self.kinds.update(other["kinds"])

    def record(self, first_seed: int, num_cases: int, methods: tuple[str, ...]) -> SensitivityRecord:
        """Return the record; margins have three digits."""
        return SensitivityRecord(
            first_seed=first_seed,
            num_cases=num_cases,
            methods=methods,
            worst_margins={name: {k: float(f"{v:.3g}") for k, v in m.items()} for name, m in self.margins.items()},
            failures=tuple(self.failures),
            layer_kinds=dict(sorted(self.kinds.items())),
            environment=dataclasses.asdict(environment.capture("cpu")),
        )


def save(record: SensitivityRecord, path: Path) -> None:
    """Write a record atomically; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def load(path: Path) -> SensitivityRecord:
    """Read a record, strictly: a missing or an unknown field is an error."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return SensitivityRecord(**{**data, "methods": tuple(data["methods"]), "failures": tuple(data["failures"])})
