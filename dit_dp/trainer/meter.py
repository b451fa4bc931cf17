"""What is seen of a step: its losses, what was dropped, how long it took, the memory."""

import resource
import sys
import time

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch
from dit_dp.objectives import Objective
from dit_dp.trainer.world import World


class LossMeter:
    """The objective, under autocast if asked for, that keeps count of the losses it gave.

    A method may run the forward more than once; then every unit counts as often, and the mean stays.

    Args:
        objective: Gives per-unit losses.
        dtype: ``float32`` or ``bf16``.
        device: Where the model is.
    """

    def __init__(self, objective: Objective, dtype: str, device: torch.device) -> None:
        self._objective, self._lower, self._device = objective, dtype == "bf16", device
        self._sum = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of units

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the (U,) losses."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._lower):
            losses = self._objective(model, batch)
        seen = losses.detach()
        finite = seen.isfinite()
        self._sum[0] += torch.where(finite, seen, 0).sum()
        self._sum[1] += finite.sum()
        return losses

    def take(self, world: World) -> float:
        """Return the mean since the last call, over all processes; NaN if there was no unit."""
        total, count = world.total(self._sum).tolist()
        self._sum.zero_()
        return total / count if count else float("nan")


class StepClock:
    """Steps and examples a second since the last line of the log."""

    def __init__(self) -> None:
        self._start, self._steps, self._units = time.perf_counter(), 0, 0

    def count(self, units: int) -> None:
        """Count a step of so many units."""
        self._steps, self._units = self._steps + 1, self._units + units

    def take(self) -> tuple[float, float]:
        """Return steps a second and examples a second since the last call."""
        now = time.perf_counter()
        seconds, steps, units = max(now - self._start, 1e-9), self._steps, self._units
        self._start, self._steps, self._units = now, 0, 0
        return steps / seconds, units / seconds


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory so far: the CUDA allocator's, or on CPU the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
