"""The progress bar: epsilon spent and its delta, loss, examples a second, peak memory."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dit_dp.privacy.statement import rounded_up
from dit_dp.trainer.price import is_bound

_SHOWN = {
    "epsilon": "ε {sign}{epsilon} (δ {delta:g})",
    "loss": "loss {loss:.4g}",
    "examples_per_s": "{examples_per_s:.4g} examples/s",
    "peak_memory_gib": "{peak_memory_gib:.3g} GiB",
}


class Progress:
    """A bar on a terminal, and nothing anywhere else.

    Args:
        total: Steps of the run.
        done: Steps taken before.
        shown: Whether this process speaks.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._bar = Bar(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, values: Mapping[str, Any]) -> None:
        """Show a step, and its numbers if there are any."""
        if values:
            self._bar.update(self._task, completed=step, description=describe(values))
        else:
            self._bar.update(self._task, completed=step)


def describe(values: Mapping[str, Any]) -> str:
    """Return a step's numbers as the bar shows them: ``ε 0.1732 (δ 1e-05)  loss 0.5``; ``ε ≤ 0.1732`` is a bound."""
    words = {**values, "sign": "≤ " if is_bound(values) else ""}
    if "epsilon" in values:
        words["epsilon"] = rounded_up(values["epsilon"])
    return "  ".join(spelled.format(**words) for name, spelled in _SHOWN.items() if name in values)
