"""A cell and its record in a few lines for people."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import Record
from memory_test.core.units import format_bytes, format_seconds


def describe_cell(config: ExperimentConfig) -> str:
    """Return what is about to be measured, with the derived sizes."""
    resolved = config.resolve(device=config.device, num_threads=config.num_threads or 0)
    if config.is_custom:
        return f"{config.experiment}: {config.model}, batch {config.batch_size}, {config.dtype}"
    size = f"{resolved['in_channels']}x{resolved['latent_size']}x{resolved['latent_size']}"
    tokens = "" if resolved["num_tokens"] is None else f", T={resolved['num_tokens']}"
    rows = "" if resolved["rows_per_unit"] == 1 else f" of {resolved['rows_per_unit']} rows each"
    return (
        f"{config.experiment}: {resolved['model']}, {resolved['image_size']} px, input {size}{tokens}, "
        f"batch {config.batch_size}{rows}, {config.dtype}{describe_training(resolved)}"
    )


def describe_training(resolved: Mapping[str, Any]) -> str:
    """Return what trains, if that is not everything: ``, trains x2, head``; a schedule's first phase, and its name."""
    train, groups = resolved.get("train"), resolved.get("trained_groups") or []
    if train in (None, "full"):
        return ""
    named = ", ".join(groups)
    return f", trains {named}" if train in (named, "x2") else f", trains {named} ({train})"


def short_result(record: Record) -> str:
    """Return the outcome in one short line."""
    if record.status != "ok":
        failure = record.failure
        return record.status if failure is None else f"{record.status}: {failure.message}"
    step = median(record.step_times_s)
    return (
        f"peak {format_bytes(record.peak_allocated_bytes)}, step {format_seconds(step)}, "
        f"{record.throughput_examples_per_s:.3g} examples/s"
    )


def describe_record(record: Record) -> str:
    """Return a record's numbers, or why it has none."""
    if record.status != "ok":
        return _describe_failure(record)
    device = record.environment.device_name if record.environment else "unknown device"
    lines = [
        f"status      ok, measured on {device}",
        f"peak        {format_bytes(record.peak_allocated_bytes)} allocated"
        + (f", {format_bytes(record.peak_reserved_bytes)} reserved" if record.peak_reserved_bytes else ""),
        f"step        {format_seconds(median(record.step_times_s))} (median of {len(record.step_times_s)}), "
        f"first {format_seconds(record.first_step_s)}, {record.throughput_examples_per_s:.3g} examples/s",
        "at the peak "
        + ", ".join(
            f"{name.replace('_', ' ')} {format_bytes(size)}"
            for name, size in sorted(record.breakdown_bytes.items(), key=lambda item: -item[1])
            if size >= 0.01 * (record.peak_allocated_bytes or 1)
        ),
    ]
    return "\n".join(lines)


def _describe_failure(record: Record) -> str:
    failure = record.failure
    if failure is None:
        return f"status      {record.status}"
    lines = [f"status      {record.status} in {failure.phase or 'an unknown phase'}", f"reason      {failure.message}"]
    if record.status == "oom":
        asked, free, limit = map(format_bytes, (failure.requested_bytes, failure.free_bytes, failure.limit_bytes))
        lines.append(f"memory      asked for {asked}, free {free}, limit {limit}")
    return "\n".join(lines)
