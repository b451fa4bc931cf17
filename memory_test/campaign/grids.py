"""Parts that are sweeps or comparisons: the suite's own runs of them, cell by cell as there is time."""

import dataclasses
from functools import cache
from pathlib import Path

from memory_test.campaign.budget import Pace
from memory_test.campaign.campaign import Outcome, Site
from memory_test.campaign.parts import Part
from memory_test.compare.args import CompareArgs
from memory_test.compare.compare import prepare as prepare_comparison
from memory_test.compare.compare import run_compare
from memory_test.compare.suite import load_suite
from memory_test.core.config import ExperimentConfig
from memory_test.sweep import sweep as sweeps
from memory_test.sweep.grid import Sweep, find_sweep, load_sweep
from memory_test.sweep.summary import describe_cell, short_result


def sweep_of(part: Part) -> Sweep:
    """Return the part's share of its sweep."""

    def belongs(config: ExperimentConfig) -> bool:
        return all(getattr(config, name) == value for name, value in part.where.items())

    sweep = _sweep(part.file)
    return dataclasses.replace(sweep, cells=[config for config in sweep.cells if belongs(config)])


@cache
def _sweep(file: str) -> Sweep:
    """Return a whole sweep, of which there are many parts."""
    return load_sweep(find_sweep(Path(file)))


def run_sweep(part: Part, site: Site, pace: Pace) -> Outcome:
    """Measure cells of a sweep."""
    plan = sweeps.prepare(sweep_of(part), site.folder(part.name), site.on_mismatch, site.retry_failed)
    found = {}
    for cell, record in sweeps.run(plan, permit=lambda cell: pace.begin()):
        found[cell.path] = record
        if cell.done is None:
            site.say(f"{part.name}: {describe_cell(cell.config)}: {short_result(record)}")
    cells = [dataclasses.replace(cell, done=found.get(cell.path)) for cell in plan.cells]
    left = dataclasses.replace(plan, cells=cells).pending
    failed = sum(record.status in ("error", "crashed") for record in found.values())
    return Outcome(done=len(found), left=len(left), failed=failed)


def run_compare_part(part: Part, site: Site, pace: Pace) -> Outcome:
    """Measure configurations of a comparison."""
    file, folder = Path(part.file), site.folder(part.name)
    pieces = prepare_comparison(load_suite(find_sweep(file)), folder, site.on_mismatch)
    pending = [piece.configuration.name for piece in pieces if piece.done is None]
    measured = 0
    for name in pending:
        if pace.begin() is None:
            break
        run_compare(CompareArgs(file=file, output_dir=folder, configuration=name, on_mismatch=site.on_mismatch))
        measured += 1
    left = len(pending) - measured
    return Outcome(done=len(pieces) - left, left=left)
