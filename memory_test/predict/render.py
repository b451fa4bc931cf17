"""A predicted record and the catalogue of cards, for people."""

from memory_test.core.schema import Record
from memory_test.core.units import GIB, format_bytes
from memory_test.predict.cards import CARDS, Card

_ATTENTION = {
    "cudnn": "cuDNN's kernel, whose workspaces are not yet calibrated on a GPU: counted as none",
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
        lines[0] += " (error unknown)" if band.peak_reserved is None else f" ± {band.peak_reserved:.0%}"
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
    context = f"with a CUDA context of {format_bytes(card.context_bytes)} (assumed)"
    line = f"device use  {format_bytes(total)} {context}; {card.name} has {format_bytes(card.memory_bytes)}"
    if failure is None:
        return [f"{line}: fits, {format_bytes(max(0, card.memory_bytes - total))} left"]
    asked, free = format_bytes(failure.requested_bytes), format_bytes(failure.free_bytes)
    where = f"in {failure.phase} {asked} are asked for with {free} free"
    return [f"{line}: DOES NOT FIT", f"reason      {where}; memory-test plan says what does"]


def describe_cards() -> str:
    """Return the catalogue as a table."""
    head = f"{'card':<18} {'memory':>9} {'SMs':>4} {'GB/s':>6} {'float32':>8} {'TF32':>6} {'bf16':>6}  source"
    lines = [head, "-" * len(head)]
    for card in CARDS.values():
        rates = f"{card.float32 / 1e12:8.1f} {card.tf32 / 1e12:6.0f} {card.bf16 / 1e12:6.0f}"
        memory = f"{card.memory_bytes / GIB:.2f} GiB"
        lines.append(
            f"{card.name:<18} {memory:>9} {card.num_sms:>4} {card.bandwidth / 1e9:6.0f} {rates}  {card.source}"
        )
    lines += ["", "Rates are dense TFLOP/s of the vendor. Others: --gpu 24GB, --gpu custom:memory=24,sms=128,..."]
    return "\n".join(lines)
