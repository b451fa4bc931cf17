"""A sweep with a progress bar: what runs, what came out, how long it will take."""

from typing import TextIO

from memory_test.core.schema import Record
from memory_test.sweep.summary import describe_cell, short_result
from memory_test.sweep.sweep import Cell, Plan, run


def run_with_progress(plan: Plan, stream: TextIO) -> list[Record]:
    """Run a plan, showing progress on a stream (one line a cell where it is not a terminal).

    Returns:
        The records; fewer than cells if some lie beyond the edge (`Sweep.stop_at_oom`).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=stream, highlight=False, soft_wrap=True)
    done = sum(cell.done is not None for cell in plan.cells)
    if done:
        console.print(f"{done} of {len(plan.cells)} cells were finished earlier and are kept", markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    records = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("cells", total=len(plan.pending))

        def announce(cell: Cell) -> None:
            bar.update(task, description=f"{cell.config.experiment} b{cell.config.batch_size}")

        for cell, record in run(plan, announce):
            records.append(record)
            if cell.done is None:
                console.print(f"{describe_cell(cell.config)}: {short_result(record)}", markup=False)
                bar.advance(task)
    if len(records) < len(plan.cells):
        console.print(f"{len(plan.cells) - len(records)} cells lie beyond the edge and were not tried", markup=False)
    return records
