"""Predicted against measured: how far off, and whether the largest batch was right. Pure functions."""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from memory_test.predict.emulator.record import PEAKS, relative, same_choices

Result = dict[str, Any]

ALLOCATED, RESERVED = 0.01, 0.03
"""Relative errors that 95 of 100 configurations must keep: of allocated and of reserved memory."""


def compared(measured: Result, predicted: Result) -> Result:
    """Return both sides of one configuration; errors only where both have peaks.

    Args:
        measured: From `memory_test.campaign.cases.measure`.
        predicted: From `memory_test.predict.emulator.sides.predict`.
    """
    found = {name: measured[name] for name in ("name", "changes", "allocator", "use")}
    found |= {"statuses": {"measured": measured["status"], "predicted": predicted["status"]}}
    if measured["status"] != "ok" or predicted["status"] != "ok":
        return found
    phases = [
        relative(got, wanted)
        for name, wanteds in measured["phases"].items()
        for got, wanted in zip(predicted["phases"].get(name, ()), wanteds, strict=False)
        if wanted and got
    ]
    return {
        **found,
        "measured": measured["peaks"],
        "predicted": predicted["peaks"],
        "relative_errors": {name: relative(predicted["peaks"][name], measured["peaks"][name]) for name in PEAKS},
        "worst_phase_error": max(phases, key=abs, default=None),
        "attention_kernels": measured["choices"]["attention_kernels"],
        "choices_agree": same_choices(measured["choices"], predicted["choices"]),
    }


def summary(entries: Iterable[Result]) -> Result:
    """Return how far predictions were off: median, 95th percentile and worst by peak; empty of no entry."""
    entries = list(entries)
    known = [entry for entry in entries if "relative_errors" in entry]
    found: Result = {"count": len(known)}
    found["statuses_that_differ"] = sum(len(set(entry["statuses"].values())) > 1 for entry in entries)
    if not known:
        return found
    for name in PEAKS:
        errors = [abs(entry["relative_errors"][name]) for entry in known]
        found[name] = {
            "median_relative_error": median(errors),
            "p95_relative_error": percentile(errors, 0.95),
            "worst_relative_error": max(errors),
        }
    found["choices_that_differ"] = sum(not entry["choices_agree"] for entry in known)
    contexts = [entry["use"]["context_bytes"] for entry in known if entry["use"].get("context_bytes")]
    found["context_bytes"] = median(contexts) if contexts else None
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def kept_targets(found: Result) -> dict[str, bool]:
    """Return whether allocated and reserved memory keep their targets."""
    allocated, reserved = found["peak_allocated_bytes"], found["peak_reserved_bytes"]
    return {
        "allocated": allocated["p95_relative_error"] <= ALLOCATED,
        "reserved": reserved["p95_relative_error"] <= RESERVED,
    }


def edge_verdict(predicted: int, statuses: dict[int, str]) -> str:
    """Return what trying a predicted largest batch has shown.

    Args:
        predicted: The batch.
        statuses: How batches ended, those that were tried.
    """
    at, above = statuses.get(predicted, "ok" if predicted == 0 else None), statuses.get(predicted + 1)
    if at is None or above is None:
        return "not tried"
    if not {at, above} <= {"ok", "oom"}:
        return "failed"
    return {("ok", "oom"): "right", ("ok", "ok"): "too small", ("oom", "oom"): "too large"}.get((at, above), "reversed")
