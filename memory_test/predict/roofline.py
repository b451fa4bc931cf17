"""Step time from counting: every operation at the rate it meets first, the device's arithmetic or its memory.

Without a calibration the rates are the vendor's ceilings, and times only rank methods and batches on one card. A
calibration (`memory-test calibrate`, on the device) replaces them by rates that kernels of DiT's shapes reach, and adds
what the host takes to launch an operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from dit_dp.clipping.contributions import HALF
from memory_test.predict.cards import Card
from memory_test.predict.flops import KERNELS, NO_KERNEL, PRODUCTS, stem
from memory_test.predict.rates import calibration_of
from memory_test.predict.replay import Place
from memory_test.predict.trace import Operation, Trace

LAUNCH_S = 5e-6
"""A usual host's time to launch an operation of PyTorch's: assumed, so that many small ones do not look free."""

UNTIMED = ("input", "idle")
"""Phases that are no part of a step's time, measured or predicted."""

KernelClass = Literal["product", "attention", "other"]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        product_float32, product_half: FLOP a second of matrix products, by operand.
        attention_float32, attention_half: FLOP a second of fused attention.
        bandwidth: Bytes a second.
        launch_s: Host's time an operation; a step takes at least as long as all launches.
        calibrated: Whether they were measured.
    """

    product_float32: float
    product_half: float
    attention_float32: float
    attention_half: float
    bandwidth: float
    launch_s: float = 0.0
    calibrated: bool = False

    @classmethod
    def ceilings(cls, card: Card | None) -> "Rates":
        """Return a card's, by its vendor; without one, a usual CPU core's."""
        if card is None:
            return cls(1e11, 1e11, 1e11, 1e11, 1e10)
        half = card.bf16 or card.float32
        return cls(card.float32, half, card.float32, half, card.bandwidth, LAUNCH_S)

    def flops(self, kind: KernelClass, *, half: bool) -> float:
        """Return FLOP a second of a kernel class."""
        if kind == "attention":
            return self.attention_half if half else self.attention_float32
        return self.product_half if half else self.product_float32


def rates_of(card: Card | None, path: Path | None = None) -> Rates:
    """Return the rates of a device: calibrated, if somebody did that, else its ceilings.

    Args:
        card: Which; `None`: this machine's CPU.
        path: A calibration file, if not the one that is shipped.
    """
    found = calibration_of(card, path)
    return Rates.ceilings(card) if found is None else Rates(**found.rates, calibrated=True)


def kernel_class(name: str) -> KernelClass:
    """Return the class of an operation, by its name in ATen."""
    if stem(name) in PRODUCTS or name in KERNELS or name.startswith("convolution"):
        return "product"
    return "attention" if name.startswith("_scaled_dot_product") else "other"


def operation_seconds(operation: Operation, rates: Rates) -> float:
    """Return the device's time of one operation."""
    rate = rates.flops(kernel_class(operation.name), half=operation.dtype in HALF)
    return max(operation.flops / rate, operation.num_bytes / rates.bandwidth)


def phase_seconds(trace: Trace, places: tuple[Place, ...], rates: Rates) -> dict[str, float]:
    """Return the seconds of each phase of the last step: the device's or the host's, whichever takes longer."""
    last = places[-1].step
    found: dict[str, float] = {}
    for place, following in pairwise(places):
        if place.step == last:
            operations = trace.operations[place.operations : following.operations]
            device = sum(op.count * operation_seconds(op, rates) for op in operations)
            host = rates.launch_s * sum(op.count for op in operations if op.name not in NO_KERNEL)
            found[place.phase] = found.get(place.phase, 0.0) + max(device, host)
    return found


def step_seconds(trace: Trace, places: tuple[Place, ...], rates: Rates) -> float:
    """Return the seconds of the last step, drawing its input left out as where it is measured."""
    found = phase_seconds(trace, places, rates)
    return sum(seconds for phase, seconds in found.items() if phase not in UNTIMED)


def rule_seconds(rates: Rates) -> Callable[[str, int, Any], float]:
    """Return the cost of a norm rule at the rates: norm and clipped sum of a weight, for so many units.

    The counts are those of `docs/architecture.md`: what `dit_dp.clipping.costs` times on a device that is there.
    """

    def cost(rule: str, units: int, call: Any) -> float:
        positions, width, out_width = int(call.positions), int(call.width), int(call.out_width)
        size = int(call.element_size)
        rate, bandwidth = rates.flops("product", half=size == 2), rates.bandwidth
        operands = units * positions * (width + out_width) * size
        gradients = 4 * units * width * out_width
        products = 2 * units * positions * width * out_width
        total = 4 * width * out_width
        if rule == "keep":  # formed and written, read for the norm unless a kernel took it, read for the sum
            reads = 1 if size == 2 else 2
            return max(products / rate, (operands + gradients) / bandwidth) + (reads * gradients + total) / bandwidth
        clipped_sum = max(products / rate, (operands + 2 * total) / bandwidth)
        if rule == "direct":  # formed, squared, dropped
            return clipped_sum + max(products / rate, (operands + 2 * gradients) / bandwidth)
        if rule == "tiled":  # operands are read again from the second-level cache
            norm = min(units * positions**2 * (width + out_width), products)
            return clipped_sum + max(norm / rate, operands / bandwidth)
        gram = 1.125 * units * positions**2 * (width + out_width)
        return clipped_sum + max(gram / rate, (operands + 12 * units * positions**2) / bandwidth)

    return cost
