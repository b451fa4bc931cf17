"""Run a comparison file: resume what is done, refuse to mix environments, keep every finished configuration."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from dit_dp import validate
from dit_dp.errors import UsageError
from memory_test.compare import schema
from memory_test.compare.args import CompareArgs
from memory_test.compare.contest import Errand, compare
from memory_test.compare.report import write_report
from memory_test.compare.suite import Configuration, Suite, load_suite
from memory_test.compare.table import terminal_page
from memory_test.core import store
from memory_test.core.schema import Environment
from memory_test.sweep.grid import find_sweep
from memory_test.sweep.process import default_threads
from memory_test.sweep.runner import config_digest, digest, probe
from memory_test.sweep.sweep import OnMismatch, check_folder, make_folder, same_environment
from memory_test.sweep.turns import untimed_turns


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A configuration with its file, what is to be done, and its result if it was finished earlier."""

    configuration: Configuration
    errand: Errand
    path: Path
    done: schema.Comparison | None


def run_compare(args: CompareArgs) -> int:
    """Measure what a comparison file names and write tables and figures.

    Args:
        args: File, folder, and what to do with results that are there.

    Returns:
        The exit code: 0 if every contender finished, else 1.

    Raises:
        UsageError: See `load_suite` and `prepare`.
    """
    validate.one_of("on_mismatch", args.on_mismatch, get_args(OnMismatch))
    suite = load_suite(find_sweep(args.file))
    if args.configuration is not None:
        validate.one_of("configuration", args.configuration, [c.name for c in suite.configurations])
    pieces = prepare(suite, args.output_dir, cast(OnMismatch, args.on_mismatch))
    results = []
    for piece in pieces:
        if args.configuration in (None, piece.configuration.name):
            results.append(finish(piece, _say))
            sys.stdout.write(terminal_page(results[-1]) + "\n")
            sys.stdout.flush()
        elif piece.done is not None:
            results.append(piece.done)
    page = write_report(suite.name, results, args.output_dir)
    counts = Counter(contender.status for result in results for contender in result.contenders)
    sys.stdout.write(f"results: {page} ({', '.join(f'{n} {status}' for status, n in counts.items())})\n")
    return 0 if set(counts) == {"ok"} else 1


def prepare(suite: Suite, folder: Path, on_mismatch: OnMismatch = "refuse") -> list[Piece]:
    """Compare a file with what is in its folder.

    Args:
        suite: The file.
        folder: Where results are; created if its parent exists.
        on_mismatch: What to do with results of another environment, or of other contenders or settings.

    Raises:
        UsageError: The folder cannot be written to, or holds results that do not belong.
    """
    check_folder(folder)
    environment, resolved = probe(suite.configurations[0].baseline.config)
    make_folder(folder)
    pieces = []
    for configuration in suite.configurations:
        errand = _errand(suite, configuration, environment, resolved["device"])
        path = folder / f"{configuration.name}.json"
        done = schema.load(path) if path.exists() else None
        if done is not None and not _belongs(done, errand, path, on_mismatch):
            done = None
        pieces.append(Piece(configuration=configuration, errand=errand, path=path, done=done))
    return pieces


def finish(piece: Piece, say: Callable[[str], None]) -> schema.Comparison:
    """Return a configuration's result: the one that is there, or a new one, saved.

    Args:
        piece: From `prepare`.
        say: Told what goes on.
    """
    name = piece.configuration.name
    if piece.done is not None:
        say(f"{name}: was finished earlier and is kept")
        return piece.done
    result = compare(piece.configuration, piece.errand, lambda text: say(f"{name}: {text}"))
    store.write_measured(schema.dump(result), piece.path)
    return result


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _errand(suite: Suite, configuration: Configuration, environment: Environment, device: str) -> Errand:
    baseline = configuration.baseline.config
    settle = suite.settle_steps
    protocol = schema.Protocol(
        rounds=suite.rounds,
        untimed_rounds=untimed_turns(baseline.warmup),
        settle_steps=(1 if device == "cuda" else 0) if settle is None else settle,
        clock="processor"
        if device == "cpu" and all(e.config.num_threads == 1 for e in configuration.entrants)
        else "wall",
    )
    threads = default_threads()
    asked = [
        [e.label, e.memory_budget_of_baseline, config_digest(e.config.resolve(device=device, num_threads=threads))]
        for e in configuration.entrants
    ]
    timed = {name: value for name, value in vars(protocol).items() if (name, value) != ("clock", "wall")}
    return Errand(
        comparison_id=digest([timed, asked]),
        description=suite.description,
        environment=environment,
        protocol=protocol,
    )


def _belongs(done: schema.Comparison, errand: Errand, path: Path, on_mismatch: OnMismatch) -> bool:
    """Return whether a result is what would be measured now; raise or tell to rerun if not."""
    if not same_environment(done.environment, errand.environment, path, on_mismatch):
        return False
    if done.comparison_id == errand.comparison_id:
        return True
    if on_mismatch == "rerun":
        return False
    raise UsageError(
        f"output_dir: {path} was measured with other contenders or settings; accepted: results of this file as it is; "
        f"choose another --output-dir, or --on-mismatch rerun to measure it again"
    )
