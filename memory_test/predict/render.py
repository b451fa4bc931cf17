"""A predicted record for people."""

from memory_test.core.schema import Record
from memory_test.core.units import format_bytes, format_seconds
from memory_test.predict.cards import Card
from memory_test.predict.predict import Imagined
from memory_test.predict.rates import Calibration
from memory_test.predict.roofline import Rates, step_seconds

_ATTENTION = {
    "cudnn": "cuDNN's kernel, counted without workspaces: on an H100 none showed",
    "flash": "the flash kernel",
    "efficient": "the memory-efficient kernel",
    "math": "plain products: no fused kernel takes these operands",
}


def describe_prediction(record: Record, card: Card | None) -> str:
    """Return what a step takes, where it is at the peak, whether it fits, and how sure that is."""
    band, repeat = record.error_band, record.repeats[0]
    assert band is not None
    assert record.peak_allocated_bytes is not None
    lines = [f"peak        {format_bytes(record.peak_allocated_bytes)} allocated ± {band.peak_allocated:.1%}"]
    if record.peak_reserved_bytes is not None:
        lines[0] += f", {format_bytes(record.peak_reserved_bytes)} reserved"
        lines[0] += " (error unknown)" if band.peak_reserved is None else f" ± {band.peak_reserved:.1%}"
    if card is not None:
        lines += _use(record, card)
    phase = max(record.phases, key=lambda name: record.phases[name].peak_allocated_bytes or 0)
    lines.append(f"peak phase  {phase}; first step {format_bytes(repeat.first_step_peak_allocated_bytes)}")
    held = sorted(record.breakdown_bytes.items(), key=lambda item: -item[1])
    named = (f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in held if size)
    lines.append("at the peak " + ", ".join(named))
    if card is not None:
        kernels = [str(name).split("_attention")[0].rsplit("_", 1)[-1] for name in record.choices["attention_kernels"]]
        lines.append("attention   " + ("; ".join(_ATTENTION.get(name, name) for name in kernels) or "none"))
    if "sharding" in record.choices:
        size, sharding = record.choices["world_size"], record.choices["sharding"]
        batch = record.config_requested["batch_size"]
        lines.append(f"ranks       this is rank 0 of {size}, {sharding}, each with a batch of {batch}")
        lines += [
            f"counted     {record.choices['ranks_covered']}",
            f"not counted {record.choices['ranks_not_covered']}",
        ]
    lines.append(f"± means     {band.source}")
    return "\n".join(lines)


def _use(record: Record, card: Card) -> list[str]:
    total, failure = record.repeats[0].device_used_bytes or 0, record.failure
    context = f"with a CUDA context of {format_bytes(card.context_bytes)} (an H100's)"
    line = f"device use  {format_bytes(total)} {context}; {card.name} has {format_bytes(card.memory_bytes)}"
    if failure is None:
        return [f"{line}: fits, {format_bytes(max(0, card.memory_bytes - total))} left"]
    asked, free = format_bytes(failure.requested_bytes), format_bytes(failure.free_bytes)
    where = f"in {failure.phase} {asked} are asked for with {free} free"
    return [f"{line}: DOES NOT FIT", f"reason      {where}; memory-test plan says what does"]


def describe_time(run: Imagined, rates: Rates, calibration: Calibration | None, num_threads: int) -> str:
    """Return a step's time with its error, or that only a ranking can be had."""
    other = calibration is not None and calibration.card == "cpu" and calibration.num_threads != num_threads
    if calibration is None or other:
        return "step time   no calibration for this device, so none is claimed; memory-test plan ranks methods"
    seconds = step_seconds(run.trace, run.places, rates)
    tried = f"off by at most {calibration.worst_error:.0%} on {len(calibration.cells)} whole steps"
    device = calibration.environment.get("device_name", calibration.card)
    return f"step time   {format_seconds(seconds)} ({tried} of {device})"
