"""Methods against ordinary training, from the records of a sweep that stops at the edge. Pure functions."""

from collections.abc import Iterable
from dataclasses import dataclass

from dit_dp.clipping.registry import METHODS
from memory_test.core.schema import Record

BASELINE = "vanilla"


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        method: Its name.
        fits: Largest batch that ran; 0: none.
        breaks: Smallest that did not for want of memory; `None`: not reached.
        memory: Peak allocated over the baseline's, at the largest batch that both ran.
        throughput: Examples/s over the baseline's, at that batch.
        batch: That batch.
        best: Largest throughput at any batch over the baseline's largest.
    """

    method: str
    fits: int
    breaks: int | None
    memory: float | None
    throughput: float | None
    batch: int | None
    best: float | None


def rows(records: Iterable[Record]) -> list[Row]:
    """Return a row for each method, in the order of `METHODS`; records are of one model and dtype."""
    by_method: dict[str, dict[int, Record]] = {}
    for record in records:
        by_method.setdefault(record.experiment, {})[record.config_requested["batch_size"]] = record
    baseline = _measured(by_method.get(BASELINE, {}))
    return [_row(method, found, baseline) for method in METHODS if (found := by_method.get(method))]


def _measured(records: dict[int, Record]) -> dict[int, Record]:
    return {batch: record for batch, record in records.items() if record.status == "ok"}


def _row(method: str, records: dict[int, Record], baseline: dict[int, Record]) -> Row:
    measured = _measured(records)
    out = [batch for batch, record in records.items() if record.status == "oom"]
    both = max(measured.keys() & baseline.keys(), default=None)
    memory = throughput = None
    if both is not None:
        mine, theirs = measured[both], baseline[both]
        memory = _over(mine.peak_allocated_bytes, theirs.peak_allocated_bytes)
        throughput = _over(mine.throughput_examples_per_s, theirs.throughput_examples_per_s)
    return Row(
        method=method,
        fits=max(measured, default=0),
        breaks=min(out, default=None),
        memory=memory,
        throughput=throughput,
        batch=both,
        best=_over(_best(measured), _best(baseline)),
    )


def _best(records: dict[int, Record]) -> float | None:
    return max((r.throughput_examples_per_s or 0.0 for r in records.values()), default=None)


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def markdown(title: str, found: Iterable[Row]) -> str:
    """Return a table in Markdown; what is not known is a dash."""
    lines = [
        f"### {title}",
        "",
        "| method | largest batch | memory | examples/s | at batch | best examples/s |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for row in found:
        edge = f"{row.fits} (not {row.breaks})" if row.breaks is not None else f"≥ {row.fits}" if row.fits else "—"
        numbers = [_number(row.memory), _number(row.throughput), str(row.batch or "—"), _number(row.best)]
        lines.append(f"| {row.method.replace('_', chr(92) + '_')} | {edge} | {' | '.join(numbers)} |")
    return "\n".join([*lines, ""])


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"
