"""The console command ``dit-dp``: parse, call, exit. Nothing heavy is imported before a command runs.

Exit codes: 0 ok; 2 the user's mistake, said in one line.
"""

import sys
from collections.abc import Callable, Sequence

from dit_dp.console import complain, guarded, say, usage
from dit_dp.errors import UsageError

NAME = "dit-dp"
COMMANDS = {
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
    runners: dict[str, Runner] = {"budget": main_budget}
    if name not in runners:
        return complain(UsageError.for_value("command", name, COMMANDS), NAME)
    return runners[name](arguments[1:], f"{NAME} {name}")


def main_budget(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Find noise, epsilon or steps."""
    from dit_dp.budget import BudgetArgs, run_budget

    return guarded(BudgetArgs, argv, prog, run_budget, name=NAME)


if __name__ == "__main__":
    sys.exit(main())
