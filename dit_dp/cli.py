"""The console command ``dit-dp``: parse, call, exit. Nothing heavy is imported before a command runs.

Exit codes: 0 ok; 2 the user's mistake, said in one line.
"""

import sys
from collections.abc import Callable, Sequence

from dit_dp.console import complain, guarded, say, usage
from dit_dp.errors import UsageError

NAME = "dit-dp"
COMMANDS = {
    "train": "train a workload under a privacy budget, resumable, on one device or many",
    "sample": "draw samples from a run",
    "evaluate": "compare samples with real images; accuracy of a classifier trained on them",
    "budget": "noise for an epsilon, epsilon for a noise, or the steps that a budget allows",
}

Runner = Callable[[Sequence[str], str], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        say(usage(NAME, "Training diffusion transformers with differential privacy.", COMMANDS))
        return 0
    from dit_dp import train

    runners: dict[str, Runner] = {
        "train": train.main,
        "sample": main_sample,
        "evaluate": main_evaluate,
        "budget": main_budget,
    }
    if name not in runners:
        return complain(UsageError.for_value("command", name, COMMANDS), NAME)
    return runners[name](arguments[1:], f"{NAME} {name}")


def main_sample(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw samples."""
    from dit_dp.sample import SampleArgs, sample

    return guarded(SampleArgs, argv, prog, sample, name=NAME)


def main_evaluate(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Evaluate samples."""
    from dit_dp.evaluate.args import EvaluateArgs

    def evaluate(args: EvaluateArgs) -> int:
        from dit_dp.evaluate.evaluate import evaluate as run_evaluate

        return run_evaluate(args)

    return guarded(EvaluateArgs, argv, prog, evaluate, name=NAME)


def main_budget(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Find noise, epsilon or steps."""
    from dit_dp.budget import BudgetArgs, run_budget

    return guarded(BudgetArgs, argv, prog, run_budget, name=NAME)


if __name__ == "__main__":
    sys.exit(main())
