"""What a norm rule costs for a weight: seconds, measured once per shape, dtype and device.

Counting misleads here: a per-unit gradient takes no more operations than ordinary training's, but may not fit a cache,
and Gram matrices are small products that run below a machine's speed.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch

from dit_dp.clipping.contributions import Direct, Outer
from dit_dp.clipping.lives import WeightCall

REPEATS = 3
"""Timed runs of a rule, of which the fastest counts: what else a machine does only adds."""

MOST_UNITS = 4
"""Units measured at once; more cost in proportion."""


def measured(device: torch.device, dtype: torch.dtype) -> Callable[[str, int, WeightCall], float]:
    """Return the cost, in seconds, of a rule for a physical batch of a weight on a device.

    Args:
        device: Where the operands are.
        dtype: Of the parameters; operands of 2 bytes an element are taken for bf16.
    """

    def cost(rule: str, batch: int, call: WeightCall) -> float:
        units = min(batch, MOST_UNITS)
        kind = torch.bfloat16 if call.element_size == 2 else dtype
        return _seconds(rule, units, call.positions, call.width, call.out_width, kind, device) * batch / units

    return cost


@lru_cache(maxsize=1024)
def _seconds(
    rule: str, units: int, positions: int, width: int, out_width: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the time of norm and clipped sum by a rule."""
    generator = torch.Generator(device=device).manual_seed(0)  # the global state of random numbers is left alone

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device).normal_(generator=generator).to(dtype)

    outer = Outer(normal(units, positions, width), normal(units, positions, out_width))
    factors = torch.ones(units, device=device)
    shape = torch.Size((out_width, width))

    def run() -> None:
        if rule == "keep":
            kept = Direct(outer.gradients(shape))
            kept.rowwise_squared_norms()
            kept.add_clipped(None, factors, shape, None)
        else:
            outer.squared_norms("direct" if rule == "direct" else "ghost")
            outer.add_clipped(None, factors, shape, None)

    times = []
    with torch.no_grad():
        for _ in range(1 + REPEATS):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])
