"""A comparison as text: one row a contender, for a terminal and as Markdown."""

from statistics import median
from typing import Any

from memory_test.compare.schema import Comparison, Contender, Spread
from memory_test.core.units import format_bytes, format_seconds
from memory_test.report.markdown import environment_line
from memory_test.report.tables import escape, markdown_table, plain_table
from memory_test.sweep.summary import describe_training

HEADINGS = (
    "contender",
    "step",
    "× time",
    "quartiles",
    "× time without noise",
    "quartiles",
    "noise",
    "peak",
    "× memory",
    "gradient error",
    "chose",
)
LEFT = (0, 10)
READING = (
    "× time: median over rounds of a contender's step over the baseline's step of the same round, and the quartiles of "
    "these ratios; without noise: the step less its noise, over the same baseline step; noise: that part alone, over "
    "the same. Drawing the input is no part of a step. Peak: the allocator's, in a pass alone on the machine. "
    "Gradient error: relative error of the clipped sum against a float64 loop over examples, half of them clipped."
)
_FOUND = ("num_parameters", "num_trainable_parameters", "attention_kernels")
"""Choices that say nothing about the engine."""


def markdown_page(name: str, comparisons: list[Comparison], figures: dict[str, str]) -> str:
    """Return all configurations as one Markdown page.

    Args:
        name: What the comparison file calls itself.
        comparisons: At least one, all of one environment.
        figures: Path of a configuration's figure, relative to the page, by configuration name.
    """
    parts = [f"# {escape(name)}"]
    parts += [escape(comparisons[0].description)] if comparisons[0].description else []
    for comparison in comparisons:
        parts += [f"## {escape(comparison.name)}", escape(subject(comparison))]
        if comparison.name in figures:
            parts.append(f"![Time against memory, {escape(comparison.name)}]({figures[comparison.name]})")
        parts.append(markdown_table(HEADINGS, [_row(c) for c in comparison.contenders], LEFT))
        lost = [f"- {escape(line)}" for line in failures(comparison)]
        parts += ["\n".join(lost)] if lost else []
        parts.append(escape(protocol_line(comparison)))
    parts += ["## How to read it", READING]
    parts += ["## Environment", escape(environment_line(comparisons[0].environment))]
    return "\n\n".join(parts) + "\n"


def summary(comparisons: list[Comparison]) -> str:
    """Return one Markdown table of all configurations: time ratio without the noise (with it) / memory ratio."""
    found = {c.name: {contender.label: contender for contender in c.contenders} for c in comparisons}
    labels = list(dict.fromkeys(label for contenders in found.values() for label in contenders))
    errors: dict[str, float] = {}
    for contenders in found.values():
        for label, contender in contenders.items():
            if contender.gradient_error is not None:
                errors[label] = max(errors.get(label, 0.0), contender.gradient_error)
    rows = [
        [label, *(_brief(found[name].get(label)) for name in found), f"{errors[label]:.1e}" if label in errors else "—"]
        for label in labels
    ]
    lines = [f"- {comparison.name}: {escape(subject(comparison))}" for comparison in comparisons]
    table = markdown_table(["contender", *found, "gradient error"], rows, (0,))
    return "\n\n".join([table, "\n".join(lines), escape(environment_line(comparisons[0].environment))]) + "\n"


def _brief(contender: Contender | None) -> str:
    if contender is None:
        return ""
    if contender.time_ratio is None or contender.time_ratio_without_noise is None or contender.memory_ratio is None:
        return contender.status
    without, whole = contender.time_ratio_without_noise.median, contender.time_ratio.median
    return f"{without:.2f} ({whole:.2f}) / {contender.memory_ratio:.2f}"


def terminal_page(comparison: Comparison) -> str:
    """Return one configuration as aligned plain text."""
    table = plain_table(HEADINGS, [_row(c) for c in comparison.contenders], LEFT)
    return "\n".join([f"{comparison.name}: {subject(comparison)}", "", table, *failures(comparison)]) + "\n"


def subject(comparison: Comparison) -> str:
    """Return what was trained, in one line."""
    c = comparison.contenders[0].config_resolved
    size = f"width {_both(c['hidden_size'])}, depth {_both(c['depth'])}" if c["hidden_size"] else c["model"]
    threads = f", {c['num_threads']} threads" if c["device"] == "cpu" else ""
    sizes = [] if c["num_tokens"] is None else [size, f"{c['image_size']} px", f"T = {c['num_tokens']}"]
    parts = [str(c["model"]).partition(" (")[0], *sizes]
    text = ", ".join([*parts, f"batch {c['batch_size']}", str(c["dtype"]), str(c["optimizer"])])
    return text + threads.replace("1 threads", "1 thread") + describe_training(c)


def _both(value: Any) -> str:
    """Return a size for people; of two streams, both."""
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def protocol_line(comparison: Comparison) -> str:
    """Return how a configuration was timed, in one line."""
    protocol = comparison.protocol
    settle = f" Untimed steps at the start of every turn: {protocol.settle_steps}." if protocol.settle_steps else ""
    threshold = comparison.max_grad_norm_of_errors
    kept = " Times are of the core: waiting for one is no part of them." if protocol.clock == "processor" else ""
    kept += " What a process frees stays with it." if comparison.keeps_freed_memory else ""
    errors = f" Gradient errors at C = {threshold:.4g}." if threshold is not None else ""
    return (
        f"Every contender in a process of its own; {protocol.rounds} rounds of one step each in rotated order, one "
        f"process running at a time, after {protocol.untimed_rounds} untimed.{settle}{kept}{errors}"
    )


def failures(comparison: Comparison) -> list[str]:
    """Return one line per contender that did not finish, and one if there is no oracle."""
    lines = []
    for contender in comparison.contenders:
        if contender.failure is not None:
            where = f" in {contender.failure.phase}" if contender.failure.phase else ""
            lines.append(f"{contender.label}: {contender.status}{where}: {contender.failure.message}")
    if comparison.oracle_failure is not None:
        lines.append(f"no gradient errors: the float64 loop failed: {comparison.oracle_failure.message}")
    return lines


def describe_choices(choices: dict[str, Any]) -> str:
    """Return what an engine chose, in a few words: ``keep 27, ghost 3``."""
    said = []
    for name, value in choices.items():
        if name in _FOUND or value in (None, {}, []):
            continue
        if isinstance(value, dict):
            said.append(", ".join(f"{key} {count}" for key, count in value.items()))
        else:
            said.append(f"{name.replace('_', ' ')} {value}")
    return "; ".join(said)


def _row(contender: Contender) -> list[str]:
    times = contender.step_times_s
    without = contender.time_ratio_without_noise
    error = contender.gradient_error
    return [
        contender.label,
        format_seconds(median(times)) if times else contender.status,
        _ratio(contender.time_ratio),
        _quartiles(contender.time_ratio),
        _ratio(without),
        _quartiles(without),
        _ratio(contender.noise_ratio),
        format_bytes(contender.peak_allocated_bytes),
        f"{contender.memory_ratio:.3f}" if contender.memory_ratio else "—",
        f"{error:.1e}" if error is not None else "—",
        describe_choices(contender.choices),
    ]


def _ratio(spread: Spread | None) -> str:
    return f"{spread.median:.3f}" if spread else "—"


def _quartiles(spread: Spread | None) -> str:
    return f"{spread.q1:.3f}–{spread.q3:.3f}" if spread else "—"
