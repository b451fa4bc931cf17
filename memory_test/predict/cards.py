"""The catalogue of cards: what a prediction needs to know of a GPU."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dit_dp import validate
from dit_dp.errors import UsageError
from memory_test.core.units import GIB, MIB

CONTEXT_BYTES = 772 * MIB
"""What a process holds on a card beside the allocator's: CUDA's context and kernels. On an H100, torch 2.11, CUDA 13.0,
770 to 776 MiB by NVML in most processes of results/h100; taken for other cards too, of which none was measured."""


Attention = Literal["auto", "cudnn", "flash", "efficient", "math"]
"""An attention kernel, or the one torch picks."""


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: As the catalogue spells it.
        memory_bytes: What the driver reports as its total, less than the label says.
        num_sms, threads_per_sm: Streaming multiprocessors, and resident threads of each.
        major, minor: Compute capability.
        bandwidth: Bytes a second of its memory.
        float32, tf32, bf16: Dense FLOP a second: of its cores, and of its tensor cores by operand; 0: it has none.
        context_bytes: Held beside the allocator's memory.
        attention: Kernel to take for granted, or ``auto``: the one torch picks.
        cudnn_convolution: Whether cuDNN convolves; what that takes inside is not known. Otherwise torch's own kernel.
        source: Where the numbers are from.
    """

    name: str
    memory_bytes: int
    num_sms: int
    threads_per_sm: int
    major: int
    minor: int
    bandwidth: float
    float32: float
    tf32: float
    bf16: float
    context_bytes: int = CONTEXT_BYTES
    attention: Attention = "auto"
    cudnn_convolution: bool = True
    source: str = ""

    @property
    def usable_bytes(self) -> int:
        """What is left to the allocator."""
        return self.memory_bytes - self.context_bytes


def _card(name: str, gib: float, sms: int, threads: int, capability: str, rates: str, source: str) -> Card:
    bandwidth, float32, tf32, bf16 = (float(rate) for rate in rates.split())
    major, minor = (int(part) for part in capability.split("."))
    return Card(
        name=name,
        memory_bytes=int(gib * GIB),
        num_sms=sms,
        threads_per_sm=threads,
        major=major,
        minor=minor,
        bandwidth=bandwidth * 1e9,
        float32=float32 * 1e12,
        tf32=tf32 * 1e12,
        bf16=bf16 * 1e12,
        source=source,
    )


_H = "NVIDIA H100 Tensor Core GPU datasheet (dense rates: half of those with sparsity)"
_A = "NVIDIA A100 Tensor Core GPU datasheet"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        #      name          GiB   SMs thr.  cap.   GB/s  TFLOP/s: float32, TF32, bf16
        _card("H200-141GB", 139.81, 132, 2048, "9.0", "4800 67 494 989", "NVIDIA H200 Tensor Core GPU datasheet"),
        _card("H100-80GB", 79.10, 132, 2048, "9.0", "3350 67 494 989", _H),
        _card("H100-PCIe-80GB", 79.10, 114, 2048, "9.0", "2000 51 378 756", _H),
        _card("A100-80GB", 79.14, 108, 2048, "8.0", "2039 19.5 156 312", _A),
        _card("A100-40GB", 39.50, 108, 2048, "8.0", "1555 19.5 156 312", _A),
        _card("L40S-48GB", 44.40, 142, 1536, "8.9", "864 91.6 183 362", "NVIDIA L40S datasheet"),
        _card("RTX-6000-Ada-48GB", 47.50, 142, 1536, "8.9", "960 91.1 182 364", _ADA),
        _card("A6000-48GB", 47.53, 84, 1536, "8.6", "768 38.7 77.4 154.8", _AMPERE),
        _card("RTX-4090-24GB", 23.64, 128, 1536, "8.9", "1008 82.6 82.6 165.2", _ADA),
        _card("RTX-3090-24GB", 23.69, 82, 1536, "8.6", "936 35.6 35.6 71", _AMPERE),
        _card("A10G-24GB", 22.06, 80, 1536, "8.6", "600 31.2 35 70", "NVIDIA A10 datasheet; AWS G5 memory"),
        _card("V100-32GB", 31.73, 80, 2048, "7.0", "900 15.7 0 0", "NVIDIA V100 datasheet"),
        _card("T4-16GB", 14.75, 40, 1024, "7.5", "320 8.1 0 0", "NVIDIA T4 datasheet"),
    )
}
"""By name. Rates are the vendor's; memory is about what torch reports as the total, **not yet read on these cards**."""


def find_card(name: str) -> Card:
    """Return a card by its name, by its label (``24GB``), by its memory (``24GiB``), or as ``custom:key=value,...``.

    A label stands for the catalogue's card of that label with the least memory; drivers report 1 to 8 % less than
    labels say. Where there is none, and where memory is given in GiB, the rest is an H100's: step times mean nothing.

    Raises:
        UsageError: There is no such card, with what is accepted; or it leaves nothing beside CUDA's context.
    """
    card = _find(name)
    if card.usable_bytes <= 0:
        least = f"more memory than CUDA's context takes, {card.context_bytes / MIB:.0f} MiB"
        raise UsageError.for_value("gpu", name, least)
    return card


def _find(name: str) -> Card:
    by_name = {card.lower(): card for card in CARDS}
    if name.lower() in by_name:
        return CARDS[by_name[name.lower()]]
    if name.lower().startswith("custom:"):
        return _custom(name[len("custom:") :])
    size = name.upper().removesuffix("IB").removesuffix("B")
    if size[-1:] == "G" and _is_number(size[:-1]):
        amount = float(size[:-1])
        if not 0 < amount < _MOST_GIB:
            raise UsageError.for_value("gpu", name, "a card with memory")
        if name.upper().endswith("IB"):
            return dataclasses.replace(
                CARDS["H100-80GB"], name=name, memory_bytes=int(amount * GIB), source="as asked for"
            )
        labelled = [card for card in CARDS.values() if card.name.endswith(f"-{size[:-1]}GB")]
        if labelled:
            card = min(labelled, key=lambda card: card.memory_bytes)
            return dataclasses.replace(card, name=f"{name} (as {card.name})")
        memory = int(SHARE_OF_LABEL * amount * GIB)
        return dataclasses.replace(
            CARDS["H100-80GB"], name=name, memory_bytes=memory, source="less than its label says"
        )
    raise UsageError.for_value("gpu", name, [*CARDS, "24GB (any size)", "custom:memory=24,sms=128,..."])


SHARE_OF_LABEL = 0.92
"""GiB that a driver reports for a GB of a card's label, at least, in the catalogue."""

_MOST_GIB = 1e6

_CUSTOM: dict[str, tuple[str, float]] = {
    "memory": ("memory_bytes", GIB),
    "sms": ("num_sms", 1),
    "threads": ("threads_per_sm", 1),
    "major": ("major", 1),
    "minor": ("minor", 1),
    "bandwidth": ("bandwidth", 1e9),
    "float32": ("float32", 1e12),
    "tf32": ("tf32", 1e12),
    "bf16": ("bf16", 1e12),
    "context": ("context_bytes", MIB),
}
"""Keys of a custom card: the attribute and the unit (GiB, counts, GB/s, TFLOP/s, MiB)."""

_MAY_BE_ZERO = ("minor", "tf32", "bf16", "context", "memory")
"""Others are divided by; memory that is none is said in its own words."""


def _custom(text: str) -> Card:
    """Return an H100 changed as asked."""
    changes: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key == "attention":
            validate.one_of("gpu: attention", value, get_args(Attention))
            changes[key] = value
            continue
        number = float(value) if key in _CUSTOM and _is_number(value) else -1.0
        if not (0 <= number <= _MOST_GIB and (number > 0 or key in _MAY_BE_ZERO)):
            raise UsageError.for_value(
                "gpu",
                f"custom:{text}",
                [*(f"{key}=NUMBER" for key in _CUSTOM), "attention=KERNEL"],
                "all optional but memory",
            )
        attribute, unit = _CUSTOM[key]
        kind = float if attribute in ("bandwidth", "float32", "tf32", "bf16") else int
        changes[attribute] = kind(number * unit)
    if not changes.get("memory_bytes"):
        raise UsageError.for_value("gpu", f"custom:{text}", "custom:memory=GIB,...", "say how much memory it has")
    return dataclasses.replace(CARDS["H100-80GB"], name=f"custom:{text}", source="as asked for", **changes)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
