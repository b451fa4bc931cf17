"""Calibration files: where they are, what they hold, which rates a prediction takes. No torch."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dit_dp.errors import UsageError
from memory_test.core.schema import STRICT
from memory_test.core.store import read
from memory_test.predict.cards import Card

SCHEMA_VERSION = 1
RATES = ("product_float32", "product_half", "attention_float32", "attention_half", "bandwidth", "launch_s")
"""Names of the rates that a file holds: the fields of `Rates` that are measured."""

FOLDER = Path(__file__).parent / "calibration"
"""Of the files that are shipped, one a card: ``H100-80GB.json``. None yet: no GPU has been calibrated."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration whose step was predicted with the rates, and measured.

    Attributes:
        experiment, batch_size, dtype: Which.
        predicted_s, measured_s: Median step time.
    """

    __pydantic_config__ = STRICT

    experiment: str
    batch_size: int
    dtype: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on one device.

    Attributes:
        card: Name in the catalogue, or of the CPU.
        rates: Arguments of `Rates` but `calibrated`.
        cells: Whole steps that the rates were tried on; none of them was used to find the rates.
        environment: Where; `device_name` among it.
        num_threads: On a CPU: the threads that were used, and of whose steps it tells.
    """

    __pydantic_config__ = STRICT

    schema_version: int = SCHEMA_VERSION
    card: str
    rates: dict[str, float]
    cells: list[Cell]
    environment: dict[str, Any]
    num_threads: int = 1

    @property
    def worst_error(self) -> float:
        """Largest relative error of a step."""
        return max((cell.error for cell in self.cells), default=float("inf"))


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Calibration)


def dump(calibration: Calibration) -> str:
    """Return it as JSON text."""
    return json.dumps(_adapter().dump_python(calibration, mode="json"), indent=1) + "\n"


def load(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        UsageError: It is none, or of a newer schema.
    """
    found: Calibration = read(path, _adapter(), "calibration", SCHEMA_VERSION)
    names = {*RATES, *found.rates}
    wrong = next((name for name in sorted(names) if name not in RATES or not found.rates.get(name, 0) > 0), None)
    if wrong is not None:
        got = f"{wrong}={found.rates.get(wrong)}"
        raise UsageError.for_value(
            "calibration", f"{path}: {got}", [f"{name} > 0" for name in RATES], "calibrate again"
        )
    return found


def calibration_of(card: Card | None, path: Path | None = None) -> Calibration | None:
    """Return the calibration to predict a device with; `None` if there is none.

    Args:
        card: Which; `None`: this machine's CPU, which has none but what is named.
        path: A file to take, whatever is shipped.

    Raises:
        UsageError: The file is of another device.
    """
    if path is not None:
        found = load(path)
        wanted = "cpu" if card is None else card.name
        if (found.card == "cpu") != (card is None) or (card is not None and found.card != card.name):
            raise UsageError.for_value("calibration", f"{path} of {found.card}", f"one of {wanted}")
        return found
    shipped = FOLDER / f"{card.name}.json" if card is not None else None
    if shipped is None or not shipped.is_file():
        return None
    found = load(shipped)
    assert card is not None
    assert found.card == card.name, f"{shipped} is of {found.card}"
    return found
