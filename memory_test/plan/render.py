"""A plan for people."""

from memory_test.core.units import GIB, format_bytes
from memory_test.plan.facts import MethodPlan, Plan

_HEAD = ("method", "physical batch", "x", "reserved", "free", "step, relative", "")


def describe_plan(plan: Plan) -> str:
    """Return the table, the noise, the recommendation and the command."""
    card, config = plan.card, plan.config
    size = "" if config["image_size"] is None else f"{config['image_size']} px, "
    lines = [
        f"{config['model']}, {size}{config['dtype']}, {config['optimizer']}, "
        f"logical batch {config['batch_size']}, on {card['name']}: {card['memory_bytes'] / GIB:.2f} GiB, "
        f"of which {format_bytes(card['context_bytes'])} for CUDA's context and {plan.margin:.0%} stay free",
        "",
        *_table([_HEAD, *(_cells(row) for row in plan.methods)]),
        "",
    ]
    lines += [f"{row.method}: {row.status}: {row.reason}" for row in plan.methods if row.reason]
    if plan.budget is not None:
        budget = plan.budget
        lines.append(
            f"noise multiplier {budget.printed_multiplier:.4f} keeps epsilon {budget.epsilon:g} at delta "
            f"{budget.delta:g} over {budget.steps} steps at sampling rate {budget.sample_rate:.3g} "
            f"({budget.neighbouring}; {budget.accountant})"
        )
    if plan.recommended is None:
        lines.append("recommended: nothing: no private method fits; take a larger card or a smaller model")
        return "\n".join(lines)
    attention = "what torch picks for the card" if card["attention"] == "auto" else card["attention"]
    lines += [
        f"recommended: {plan.recommended}, the fastest private method that fits; on the card, measure it with",
        f"  {plan.command}",
        plan.calibrated
        or "Relative times only rank: operations at the card's ceilings, 5 µs a launch, no calibration.",
        f"Memory is predicted, not measured; attention: {attention}.",
    ]
    return "\n".join(lines)


def _cells(row: MethodPlan) -> tuple[str, ...]:
    if row.status != "fits":
        return (row.method, "—", "", format_bytes(row.peak_reserved_bytes), "—", "—", row.status)
    time = "—" if row.relative_step_time is None else f"{row.relative_step_time:.2f}"
    how = "by the engine itself" if row.in_engine else ""
    sizes = (format_bytes(row.peak_reserved_bytes), format_bytes(row.free_bytes))
    return (row.method, str(row.physical_batch), str(row.accumulation), *sizes, time, how)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(_HEAD))]
    lines = []
    for row in rows:
        first, *rest = (cell.ljust(width) if index in (0, 6) else cell.rjust(width)
                        for index, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("  ".join([first, *rest]).rstrip())
    return lines
