"""What engines ask about the device they run on, so that a step can be imagined on a device that is not there.

A prediction runs the same engines on tensors without data, that stand for another device's. It answers here in that
device's place.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

T = TypeVar("T")

NORM_SCOPE = "dit_dp.clipping"
"""Name of the profiler range in which buffers for norms are allocated, so that meters can attribute them."""


class Hardware:
    """The devices that tensors say they are on.

    Attributes:
        rule_seconds: What a norm rule costs, ``(rule, units, call) -> seconds``; `None`: it is measured.
        has_data: Whether trials can tell anything about examples; where tensors hold no data they need not be made.
    """

    rule_seconds: Callable[[str, int, Any], float] | None = None
    has_data: bool = True

    def is_cuda(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on CUDA."""
        return tensor.is_cuda

    def free_bytes(self, device: torch.device) -> int:
        """Return what may still be allocated on a device."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        import psutil

        return int(psutil.virtual_memory().available)

    def holds(self, condition: Tensor, *, usually: bool) -> bool:
        """Return whether a tensor of one bool is true; where tensors hold no data, the usual answer."""
        return bool(condition)

    def later(self, condition: Tensor, *, usually: bool) -> Callable[[], bool]:
        """Return who says what `holds` would: a GPU goes on with what is queued until the answer is asked for."""
        if not condition.is_cuda:
            known = self.holds(condition, usually=usually)
            return lambda: known
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(condition, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(condition.device))

        def said() -> bool:
            arrived.synchronize()
            return bool(answer)

        return said

    def with_data(self) -> contextlib.AbstractContextManager[object]:
        """Return a context whose tensors hold data wherever the step is imagined: a generator's state is the host's."""
        return contextlib.nullcontext()

    def norm_scope(self) -> contextlib.AbstractContextManager[object]:
        """Return a profiler range for norm and Gram buffers; nothing at all, and no cost, where no profiler runs."""
        return record_function(NORM_SCOPE) if torch._C._autograd._profiler_enabled() else contextlib.nullcontext()

    def rounds(self, count: int) -> Iterable[int]:
        """Return 0 ... count - 1, the rounds of a loop; where one is like another, a few can stand for all."""
        return range(count)

    def apply(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function of tensors returns, one or none; what it takes follows from their shapes alone.

        All functions made of one piece of code are one: what they close over is the same, or does not matter.
        """
        return function(*args)


_hardware = Hardware()


def hardware() -> Hardware:
    """Return who answers."""
    return _hardware


@contextlib.contextmanager
def imagined(other: Hardware) -> Iterator[None]:
    """Have another answer meanwhile."""
    global _hardware
    before, _hardware = _hardware, other
    try:
        yield
    finally:
        _hardware = before
