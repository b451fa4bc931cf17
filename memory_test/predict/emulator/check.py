"""Compares predictions with the emulated runtime, configuration by configuration; finished ones are kept.

``python -m memory_test.predict.emulator.check PYTHON FOLDER``: an interpreter with torch's CUDA build, and where the
record goes; see the Makefile.
"""

import dataclasses
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text
from memory_test.predict.emulator.build import ROOT, Emulator, build
from memory_test.predict.emulator.cases import CASES
from memory_test.predict.emulator.edges import EDGES, compare_edge
from memory_test.predict.emulator.figure import DESCRIPTION, scatter
from memory_test.predict.emulator.record import NOT_COVERED, SCHEMA_VERSION, WHAT, Result, entry, summary
from memory_test.predict.emulator.sides import CARD, Kept, emulate, predict
from memory_test.report.palette import to_png, to_svg

logger = logging.getLogger(__name__)


def configurations(emulator: Emulator, kept: Kept) -> list[Result]:
    """Compare every configuration."""
    found = []
    for case in CASES:
        emulated = kept.get("emulated", case.name, lambda case=case: emulate(emulator, case))  # type: ignore[misc]
        predicted = kept.get("predicted", case.name, lambda case=case: predict(case))  # type: ignore[misc]
        for side, result in (("emulated", emulated), ("predicted", predicted)):
            if result["status"] != "ok":
                raise RuntimeError(f"{case.name}, {side}: {result['error']}")
        found.append(entry(case, emulated, predicted))
        errors = (f"{100 * error:+.3f} %" for error in found[-1]["relative_errors"].values())
        logger.info("%s: %s%s", case.name, ", ".join(errors), _remarks(found[-1]))
    return found


def _remarks(found: Result) -> str:
    remarks = [] if found["choices_agree"] else ["choices differ"]
    if found["allocator_first_difference"] is not None:
        remarks.append(found["allocator_first_difference"])
    return "; ".join(["", *remarks])


def edges(emulator: Emulator, kept: Kept) -> list[Result]:
    """Find where memory runs out."""
    found = []
    for edge in EDGES:
        found.append(compare_edge(edge, emulator, kept))
        logger.info(
            "%s: at most %d emulated, %d predicted", edge.case.name, found[-1]["emulated"], found[-1]["predicted"]
        )
    return found


def versions(python: Path) -> dict[str, str]:
    """Return the packages of the emulated side that matter."""
    script = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({n: m.version(n) for n in ('torch', 'opacus', 'triton', 'nvidia-cublas', 'numpy')}))"
    )
    done = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main(python: Path, folder: Path) -> None:
    """Compare all, write the record and draw it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.simplefilter("ignore")
    path = folder / "emulator.json"
    check_writable(path)
    emulator = build(python, ROOT / "build" / "emulator")
    kept = Kept(ROOT / "build" / "emulator" / "kept")
    compared, at_edges = configurations(emulator, kept), edges(emulator, kept)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "what": WHAT,
        "not_covered": NOT_COVERED,
        "environment": dataclasses.asdict(capture("cpu")),
        "emulated_packages": versions(emulator.python),
        "card": {**dataclasses.asdict(CARD), "usable_bytes": CARD.usable_bytes},
        "summary": summary(compared, at_edges),
        "configurations": compared,
        "edges": at_edges,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    figure, title = scatter(record), "Predicted against emulated peak memory"
    write_text(path.with_suffix(".svg"), to_svg(figure, title, DESCRIPTION))
    path.with_suffix(".png").write_bytes(to_png(figure, title, DESCRIPTION))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
