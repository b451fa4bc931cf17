"""`memory-test predict`: imagine a cell on a card, say what it takes, write what was asked for."""

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.core.measure import Measured
from memory_test.core.schema import Record
from memory_test.predict.allocator import OutOfMemoryError
from memory_test.predict.args import PredictArgs
from memory_test.predict.cards import Card
from memory_test.predict.predict import Imagined, imagined_run, predict_memory
from memory_test.predict.rates import calibration_of
from memory_test.predict.record import predicted_record
from memory_test.predict.refusals import named
from memory_test.predict.render import describe_prediction, describe_time
from memory_test.predict.roofline import rates_of
from memory_test.predict.settings import AllocatorSettings
from memory_test.predict.snapshot import write_snapshot
from memory_test.sweep.process import default_threads
from memory_test.sweep.summary import describe_cell


def run_predict(args: PredictArgs) -> int:
    """Predict and report; return the exit code."""
    config, card = args.config, args.card
    sys.stderr.write(f"{describe_cell(config)}, on {args.gpu}: predicted, nothing is run\n")
    device = "cpu" if card is None else "cuda"
    resolved = config.resolve(device=device, num_threads=config.num_threads or default_threads()) | args.ranks
    rates = rates_of(card, args.calibration)
    with named(config.model_label), contextlib.redirect_stdout(sys.stderr):  # what a callable of the user's prints
        run = imagined_run(resolved, card, rates=rates)
    found, failure = on_card(run, card, args.settings)
    record = predicted_record(config, resolved, card, args.settings, found, failure)
    sys.stdout.write(describe_prediction(record, card) + "\n")
    sys.stdout.write(describe_time(run, rates, calibration_of(card, args.calibration), resolved["num_threads"]) + "\n")
    _write(args, record, run, card)
    return 0 if failure is None else 1


def on_card(
    run: Imagined, card: Card | None, settings: AllocatorSettings | None = None
) -> tuple[Measured, OutOfMemoryError | None]:
    """Return what a run takes within a card's memory; if it does not fit, what it would take, and why."""
    try:
        return predict_memory(run, card, settings=settings, limited=card is not None), None
    except OutOfMemoryError as error:
        return predict_memory(run, card, settings=settings), error


def _write(args: PredictArgs, record: Record, run: Imagined, card: Card | None) -> None:
    """Write the files that were asked for."""
    if args.output is not None:
        store.save(record, args.output)
        sys.stdout.write(f"record: {args.output}\n")
    if args.timeline is not None:
        _write_page(record, args.timeline)
        sys.stdout.write(f"page: {args.timeline}\n")
    if args.snapshot is not None:
        assert card is not None
        write_snapshot(run, args.settings, args.snapshot)
        sys.stdout.write(f"snapshot: {args.snapshot}\n")


def _write_page(record: Record, path: Path) -> None:
    """Write the report's page about what a step takes, whether or not that fits the card."""
    from memory_test.report.report import write_report

    drawn = dataclasses.replace(record, status="ok", failure=None)
    with tempfile.TemporaryDirectory(prefix="memory-test-") as folder:
        store.save(drawn, Path(folder) / "record.json")
        page = write_report(Path(folder), Path(folder) / "report").html
        try:
            shutil.copyfile(page, path)
        except OSError as error:
            raise UsageError(f"timeline: cannot write {path}: {error.strerror}") from error
