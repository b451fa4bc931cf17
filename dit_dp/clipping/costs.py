"""What a norm rule costs for a weight: seconds, measured once per shape, dtype and device.

Counting misleads here: a per-unit gradient takes no more operations than ordinary training's, but may not fit a cache,
and Gram matrices are small products that run below a machine's speed.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch

from dit_dp.clipping import tiled
from dit_dp.clipping.contributions import Outer, everyone
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.lives import WeightCall
from dit_dp.clipping.planner import RULES

REPEATS = 5
"""Timed runs of each rule, in turns, of which the fastest counts: what else a machine does only adds."""

MOST_UNITS = 4
"""Units that a CPU measures at once; more cost in proportion."""

CUDA_BYTES, CUDA_SHARE = 2**31, 0.25
"""A GPU measures more at once, since few would not fill it: a power of two whose operands and gradients take at most so
many bytes, and at most that share of what is free."""


def measured(device: torch.device, dtype: torch.dtype) -> Callable[[str, int, WeightCall], float]:
    """Return the cost, in seconds, of a rule for a physical batch of a weight on a device.

    Args:
        device: Where the operands are.
        dtype: Of the parameters; operands of 2 bytes an element are taken for bf16.
    """
    room = min(CUDA_BYTES, int(CUDA_SHARE * hardware().free_bytes(device))) if device.type == "cuda" else 0

    def cost(rule: str, batch: int, call: WeightCall) -> float:
        units = min(batch, MOST_UNITS)
        if device.type == "cuda":
            each = 4 * call.width * call.out_width + 6 * call.positions * (call.width + call.out_width)
            units = 1 << (max(1, min(batch, room // each)).bit_length() - 1)
        kind = torch.bfloat16 if call.element_size == 2 else dtype
        seconds = _seconds(units, call.positions, call.width, call.out_width, kind, device)
        return seconds[rule] * batch / units

    return cost


@lru_cache(maxsize=1024)
def _seconds(
    units: int, positions: int, width: int, out_width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Return the time of norm and clipped sum by each rule; infinity where CUDA has no triton for it."""
    generator = torch.Generator(device=device).manual_seed(0)  # the global state of random numbers is left alone

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    outer = Outer(normal(units, positions, width), normal(units, positions, out_width))
    factors = torch.ones(units, device=device)
    shape = torch.Size((out_width, width))

    def run(rule: str) -> None:
        if rule == "keep":
            kept, _ = outer.kept(shape)
            kept.add_clipped(None, factors, shape, everyone)
            return
        if rule == "tiled":
            tiled.squared_norms(outer.a, outer.g)
        else:
            outer.squared_norms("direct" if rule == "direct" else "ghost")
        outer.add_clipped(None, factors, shape, everyone)

    clock = _clock(device)
    fastest: dict[str, float] = dict.fromkeys(RULES, float("inf"))
    rules = RULES if device.type != "cuda" or find_spec("triton") else [rule for rule in RULES if rule != "tiled"]
    with torch.no_grad():
        for index in range(-1, REPEATS):
            for rule in rules:
                start = clock()
                run(rule)
                if index >= 0:  # the first is warming up
                    fastest[rule] = min(fastest[rule], clock() - start)
    return fastest


def _clock(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits for a GPU; on one CPU thread, its own time: waiting for the core is no part of it."""
    if device.type == "cuda":

        def after_all() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return after_all
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
