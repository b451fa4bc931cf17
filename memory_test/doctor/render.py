"""An examination as tables for people, plain where the output is no terminal, or as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memory_test.core.schema import Environment
from memory_test.doctor.facts import Check, Diagnosis, Examination

SCHEMA_VERSION = 1
WIDTH = 100

MEASURES = {
    "determinism": "two runs differ by",
    "coupling": "gradient of others",
    "reference": "float64 loop",
    "coverage": "without gradient",
    "exactness": "error, float64 loop",
    "float64": "the same in float64",
    "removal": "move, one removed",
    "independence": "move of the others",
    "order": "move, reversed",
    "accumulation": "move, in parts",
    "empty batch": "largest entry",
    "non-finite": "move of the others",
    "noise": "surprise, -log10 p",
    "restoration": "change",
}
"""What the number of each check is, in few words; moves of the clipped sum are in units of C."""

_STYLES = {"passed": "", "failed": "bold red", "refused": "yellow"}
_GAP = 2
_ROOM = WIDTH - sum(max(map(len, column)) + _GAP for column in (MEASURES.keys(), MEASURES.values(), ["at most"]))
"""Characters left for the columns of methods."""


def write_text(examination: Examination, out: TextIO) -> None:
    """Write what people read, 100 columns wide where `out` is no terminal."""
    console = Console(file=out, highlight=False, width=None if out.isatty() else WIDTH)
    console.print(Text(_headline(examination)))
    model, *methods = examination.diagnoses
    for diagnoses in ([model], *_side_by_side(methods)):
        console.print()
        console.print(_table(diagnoses))
    for diagnosis in examination.diagnoses:
        for check in diagnosis.checks:
            if check.status != "passed":
                console.print()
                console.print(_complaint(diagnosis, check))
                console.print(Padding(Text(check.explanation), (0, 0, 0, 2), expand=False))
    console.print()
    console.print(_verdict(examination))


def _side_by_side(diagnoses: Sequence[Diagnosis]) -> list[list[Diagnosis]]:
    """Split diagnoses into tables that are narrow enough."""
    tables: list[list[Diagnosis]] = []
    left = 0
    for diagnosis in diagnoses:
        width = max(len(diagnosis.subject), len("1.0000")) + _GAP
        if width > left:
            tables.append([])
            left = _ROOM
        tables[-1].append(diagnosis)
        left -= width
    return tables


def _headline(examination: Examination) -> str:
    head = f"{examination.model}: {examination.num_parameters:,} trainable parameters, seed {examination.seed}"
    if examination.max_grad_norm is None:
        return f"{head}, {examination.num_examples} examples"
    clipped = f"{examination.num_clipped} of {examination.num_examples} examples are clipped"
    return f"{head}\n{clipped} at C = {examination.max_grad_norm:.4g}"


def _table(diagnoses: Sequence[Diagnosis]) -> Table:
    """Return checks as rows and subjects as columns."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("check")
    table.add_column("what is measured", style="dim")
    table.add_column("at most", justify="right", style="dim")
    for diagnosis in diagnoses:
        table.add_column(diagnosis.subject, justify="right")
    found = [{check.name: check for check in diagnosis.checks} for diagnosis in diagnoses]
    for name, measure in MEASURES.items():
        row = [checks.get(name) for checks in found]
        bounds = [check.bound for check in row if check is not None and check.bound is not None]
        if any(check is not None for check in row):
            table.add_row(name, measure, _number(bounds[0]) if bounds else "", *map(_cell, row))
    return table


def _cell(check: Check | None) -> Text:
    if check is None:
        return Text("")
    if check.status == "refused":
        return Text("refused", _STYLES["refused"])
    if check.measured is None:
        return Text("raised", _STYLES["failed"])
    number = _number(check.measured)
    return Text(number if check.status == "passed" else f"{number} !", _STYLES[check.status])


def _number(value: float) -> str:
    """Return a number in few characters; bounds just above 1 keep their digits."""
    return f"{value:.4f}" if 0.9 < value < 1.1 else f"{value:.2g}"


def _complaint(diagnosis: Diagnosis, check: Check) -> Text:
    """Say what failed and by how much, or who refused."""
    if check.status == "refused":
        return Text(f"{diagnosis.subject}: refused", _STYLES["refused"])
    text = Text(f"{diagnosis.subject}, {check.name}: failed", _STYLES["failed"])
    if check.measured is not None and check.bound is not None:
        text.append(f", {_number(check.measured)} where at most {_number(check.bound)} may be", "default not bold")
    return text


def _verdict(examination: Examination) -> Text:
    checks = [check for diagnosis in examination.diagnoses for check in diagnosis.checks]
    if examination.passed:
        return Text(f"All {len(checks)} checks passed.", "green")
    counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
    return Text(", ".join(f"{count} {status}" for status, count in counts.items() if count) + ".", "bold")


def to_json(examination: Examination, environment: Environment) -> str:
    """Return one JSON document: ``{schema_version, environment, examination}``.

    Keys are the fields of `facts.Examination` and `schema.Environment`; a number that is not finite is a string.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "environment": dataclasses.asdict(environment),
        "examination": dataclasses.asdict(examination),
    }
    return json.dumps(_finite(document), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a structure whose infinities and NaNs are strings: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
