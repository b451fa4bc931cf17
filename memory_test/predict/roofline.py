"""Step time from counting: every operation at the ceiling it meets first, the card's arithmetic or its memory.

Ceilings are the vendor's; what a real kernel reaches of them is for a calibration to say. Without one the times rank
methods and batches on one card, and are not offered as times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_dp.clipping.contributions import HALF
from memory_test.predict.cards import Card
from memory_test.predict.trace import Operation


@dataclass(frozen=True)
class Ceilings:
    """Highest rates of a device.

    Attributes:
        float32, half: FLOP a second by operand.
        bandwidth: Bytes a second.
    """

    float32: float
    half: float
    bandwidth: float

    @classmethod
    def of(cls, card: Card | None) -> "Ceilings":
        """Return a card's; without one, a usual CPU core's."""
        if card is None:
            return cls(1e11, 1e11, 1e10)
        return cls(card.float32, card.bf16 or card.float32, card.bandwidth)


def operation_seconds(operation: Operation, ceilings: Ceilings) -> float:
    """Return the time of one operation at the ceilings."""
    rate = ceilings.half if operation.dtype in HALF else ceilings.float32
    return max(operation.flops / rate, operation.num_bytes / ceilings.bandwidth)


def rule_seconds(ceilings: Ceilings) -> Callable[[str, int, Any], float]:
    """Return the cost of a norm rule at the ceilings: norm and clipped sum of a weight, for so many units.

    The counts are those of `docs/architecture.md`: what `dit_dp.clipping.costs` times on a device that is there.
    """

    def cost(rule: str, units: int, call: Any) -> float:
        positions, width, out_width = int(call.positions), int(call.width), int(call.out_width)
        size = int(call.element_size)
        rate = ceilings.half if size == 2 else ceilings.float32
        operands = units * positions * (width + out_width) * size
        gradients = 4 * units * width * out_width
        products = 2 * units * positions * width * out_width
        total = 4 * width * out_width
        if rule == "keep":  # formed and written, read for the norm, read for the sum
            return (
                max(products / rate, (operands + gradients) / ceilings.bandwidth)
                + (2 * gradients + total) / ceilings.bandwidth
            )
        clipped_sum = max(products / rate, (operands + 2 * total) / ceilings.bandwidth)
        if rule == "direct":  # formed, squared, dropped
            return clipped_sum + max(products / rate, (operands + 2 * gradients) / ceilings.bandwidth)
        gram = 1.125 * units * positions**2 * (width + out_width)
        return clipped_sum + max(gram / rate, (operands + 12 * units * positions**2) / ceilings.bandwidth)

    return cost
