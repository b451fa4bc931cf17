"""The progress bar: epsilon spent, loss, examples a second, peak memory."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SHOWN = {
    "epsilon": "ε {:.3g}",
    "loss": "loss {:.4g}",
    "examples_per_s": "{:.4g} examples/s",
    "peak_memory_gib": "{:.3g} GiB",
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
        text = "  ".join(spelled.format(values[name]) for name, spelled in _SHOWN.items() if name in values)
        if text:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self._bar.update(self._task, completed=step)
