"""The console command ``memory-test``: parse, call, exit. Nothing heavy is imported before a command runs.

Exit codes: 0 ok; 1 a record with any other status, or a check of the doctor that did not pass; 2 the user's mistake,
said in one line.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from dit_dp.console import complain, guarded, note, say, usage
from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig

COMMANDS = {
    "run": "measure one cell and write its record",
    "sweep": "measure every cell of a YAML file, resumable",
    "compare": "time methods against a baseline in turns, step by step, resumable",
    "report": "figures, Markdown and one HTML page from a folder of records",
    "inspect": "module tree, trainable parameters, which method supports which layer",
    "predict": "what a cell takes on a GPU, without one",
    "plan": "which method and batch fit a card, and the command to run",
    "calibrate": "measure this device's rates, so that predicted step times are times",
    "cards": "the GPUs that predictions know",
    "doctor": "check that private methods keep their promise on a model",
}
NAME = "memory-test"
RESULTS = Path("results") / "runs"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """Measure one method on one model and write a JSON record."""

    config: ExperimentConfig
    output: Path | None = None
    """File of the record; default: a new file below results/runs."""


@dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """Measure every cell of a sweep file; finished cells are kept and skipped."""

    file: tyro.conf.Positional[Path]
    """YAML file with base and grid, or the name of a shipped one: demo, cpu_small, workloads,
    h100_core, h100_engine, h100_smoke."""
    output_dir: Path
    """Folder of the records, one file a cell."""
    on_mismatch: Annotated[str, tyro.conf.arg(metavar="{refuse,rerun}")] = "refuse"
    """What to do with records of another environment."""
    retry_failed: bool = False
    """Run cells again that ended in error, timeout or crash."""
    report: bool = False
    """Write the report into OUTPUT_DIR/report when done."""


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Turn a folder of records into figures, Markdown and one HTML page."""

    folder: tyro.conf.Positional[Path]
    """Folder of records."""
    output_dir: Path | None = None
    """Where the report goes; default: FOLDER/report."""


@dataclass(frozen=True, kw_only=True)
class CardsArgs:
    """List the GPUs that predictions know: memory, rates and where they are from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        say(
            usage(
                NAME, "What differential privacy costs a diffusion transformer: memory and time, by method.", COMMANDS
            )
        )
        return 0
    runners = {
        "run": main_run,
        "sweep": main_sweep,
        "compare": main_compare,
        "report": main_report,
        "inspect": main_inspect,
        "predict": main_predict,
        "plan": main_plan,
        "calibrate": main_calibrate,
        "cards": main_cards,
        "doctor": main_doctor,
    }
    if name not in runners:
        return complain(UsageError.for_value("command", name, COMMANDS), NAME)
    return runners[name](arguments[1:], f"memory-test {name}")


def main_run(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Measure one cell."""
    return _guarded(RunArgs, argv, prog, _run)


def main_sweep(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a sweep."""
    return _guarded(SweepArgs, argv, prog, _sweep)


def main_compare(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a paired comparison."""
    from memory_test.compare.args import CompareArgs

    def compare(args: CompareArgs) -> int:
        from memory_test.compare.compare import run_compare

        return run_compare(args)

    return _guarded(CompareArgs, argv, prog, compare)


def main_report(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write a report."""
    return _guarded(ReportArgs, argv, prog, _report)


def main_inspect(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Inspect a model."""
    from memory_test.inspection.args import InspectArgs

    def inspect(args: InspectArgs) -> int:
        from memory_test.inspection.inspection import run_inspect

        return run_inspect(args)

    return _guarded(InspectArgs, argv, prog, inspect)


def main_doctor(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check private methods on a model."""
    from memory_test.doctor.args import DoctorArgs

    def doctor(args: DoctorArgs) -> int:
        from memory_test.doctor.command import run_doctor

        return run_doctor(args)

    return _guarded(DoctorArgs, argv, prog, doctor)


def main_predict(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Predict a cell."""
    from memory_test.predict.args import PredictArgs
    from memory_test.predict.garbage import rarely_collected

    def predict(args: PredictArgs) -> int:
        from memory_test.predict.command import run_predict

        return run_predict(args)

    with rarely_collected():
        return _guarded(PredictArgs, argv, prog, predict)


def main_plan(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Plan method and batch for a card."""
    from memory_test.plan.args import PlanArgs
    from memory_test.plan.recipe import with_recipe
    from memory_test.predict.garbage import rarely_collected

    def plan(args: PlanArgs) -> int:
        from memory_test.plan.command import run_plan

        return run_plan(args)

    with rarely_collected():
        return _guarded(PlanArgs, argv, prog, plan, with_recipe)


def main_calibrate(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Calibrate the device at hand."""
    from memory_test.predict.args import CalibrateArgs

    def calibrate(args: CalibrateArgs) -> int:
        from memory_test.predict.calibrate import run_calibrate

        return run_calibrate(args)

    return _guarded(CalibrateArgs, argv, prog, calibrate)


def main_cards(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """List the catalogue of cards."""
    from memory_test.predict.cards import describe_cards

    def cards(args: CardsArgs) -> int:
        say(describe_cards())
        return 0

    return _guarded(CardsArgs, argv, prog, cards)


# --- commands -----------------------------------------------------------------------------------------------------


def _run(args: RunArgs) -> int:
    from memory_test.core import store
    from memory_test.sweep.runner import run_cell
    from memory_test.sweep.summary import describe_cell, describe_record

    output = args.output or _default_output(args.config)
    store.check_writable(output)
    note(describe_cell(args.config))
    record = run_cell(args.config)
    store.save_measured(record, output)
    say(describe_record(record))
    say(f"record: {output}")
    return 0 if record.status == "ok" else 1


def _sweep(args: SweepArgs) -> int:
    from memory_test.sweep import sweep as sweeps
    from memory_test.sweep.grid import find_sweep, load_sweep
    from memory_test.sweep.progress import run_with_progress

    if args.on_mismatch not in ("refuse", "rerun"):
        raise UsageError.for_value("on_mismatch", args.on_mismatch, ("refuse", "rerun"))
    plan = sweeps.prepare(load_sweep(find_sweep(args.file)), args.output_dir, args.on_mismatch, args.retry_failed)  # type: ignore[arg-type]
    records = run_with_progress(plan, sys.stderr)
    if args.report:
        _write_report(args.output_dir, args.output_dir / "report", [cell.path for cell in plan.cells])
    counts = {status: sum(r.status == status for r in records) for status in dict.fromkeys(r.status for r in records)}
    say(f"records: {args.output_dir} ({', '.join(f'{n} {status}' for status, n in counts.items())})")
    return 0 if all(record.status == "ok" for record in records) else 1


def _report(args: ReportArgs) -> int:
    _write_report(args.folder, args.output_dir or args.folder / "report")
    return 0


def _write_report(folder: Path, output_dir: Path, only: Sequence[Path] | None = None) -> None:
    from memory_test.report.frames import load_frame
    from memory_test.report.markdown import terminal_table
    from memory_test.report.report import write_report

    paths = write_report(folder, output_dir, only)
    say(terminal_table(load_frame(folder, only)))
    say(f"report: {paths.html}")


# --- what commands share ------------------------------------------------------------------------------------------


def _guarded(
    kind: type[T],
    argv: Sequence[str] | None,
    prog: str | None,
    command: Callable[[T], int],
    prepare: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> int:
    """Parse, run and turn a user's mistake into one line and exit code 2."""
    interrupted = "interrupted; finished cells are kept"
    return guarded(kind, argv, prog, command, name=NAME, prepare=prepare, interrupted=interrupted)


def _default_output(config: ExperimentConfig) -> Path:
    import datetime

    RESULTS.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return RESULTS / f"{stamp}-{config.experiment}-{config.file_label}-b{config.batch_size}.json"


if __name__ == "__main__":
    sys.exit(main())
