"""What attention and convolution allocate inside on this GPU, from the caching allocator's history.

``python -m memory_test.campaign.workspaces FILE``. Predictions know what torch's own kernels take
(`memory_test.predict.temporaries`) and not what cuDNN does; these are the numbers that its row is to be made from.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory_test.campaign.processes import record_of
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
HEADS = ((6, 64), (12, 64), (16, 72))
"""(heads, width of a head) of DiT-S, DiT-B and DiT-XL."""

BATCHES = {256: (1, 2, 8, 64), 1024: (1, 2, 8), 16384: (1, 2)}
"""Batches by positions."""

TIMED = 5


@dataclass(frozen=True)
class Found:
    """One operation.

    Attributes:
        inside: Bytes of allocations that are gone when it ends, in the order in which they were made.
        staying: Bytes of those that are still there: results, and what a library keeps.
        first_staying: Of the first call; what is more than later is the library's to keep.
        seconds: Median time of a call.
    """

    inside: list[int]
    staying: list[int]
    first_staying: list[int]
    seconds: float


def split(history: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Return the sizes of what was allocated and given back in a history, and of what was not."""
    made: list[tuple[int, int, bool]] = []
    for entry in history:
        if entry["action"] == "alloc":
            made.append((entry["addr"], entry["size"], True))
        elif entry["action"] == "free_requested":
            last = next((i for i in reversed(range(len(made))) if made[i][0] == entry["addr"] and made[i][2]), None)
            if last is not None:
                made[last] = (*made[last][:2], False)
    return [size for _, size, alive in made if not alive], [size for _, size, alive in made if alive]


def watched(run: Callable[[], object]) -> tuple[list[int], list[int]]:
    """Return what a call allocates inside, and what of it stays."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(context=None, max_entries=100_000)
    result = run()
    torch.cuda.synchronize()
    history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    del result
    return split(history)


def examined(run: Callable[[], object]) -> Found:
    """Return what a call takes, once it has been made before."""
    _, first = watched(run)
    inside, staying = watched(run)
    event: Any = torch.cuda.Event
    times = []
    for _ in range(TIMED):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return Found(inside, staying, first, median(times))


def both_ways(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Return what a function takes, forward and backward; or why it cannot run."""
    try:
        ahead = examined(forward)
        out = forward()
        gradient = torch.randn_like(out)
        back = examined(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True))
    except RuntimeError as error:  # this library takes no such operands
        return {"status": "refused", "message": " ".join(str(error).split())[:200]}
    return {"status": "ok", "forward": asdict(ahead), "backward": asdict(back)}


def attention() -> Iterator[dict[str, Any]]:
    """Yield a row for each library and shape."""
    for positions, batches in BATCHES.items():
        for heads, width in HEADS:
            for batch in batches:
                for name, dtype in DTYPES.items():
                    shape = (batch, positions, 3, heads, width)
                    packed = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
                    q, k, v = packed.permute(2, 0, 3, 1, 4)  # the strides that DiT's have
                    for library, backend in BACKENDS.items():
                        with sdpa_kernel([backend]):
                            found = both_ways(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), (q, k, v))  # type: ignore[misc]
                        yield {"library": library, "shape": [batch, heads, positions, width], "dtype": name, **found}


def convolution() -> Iterator[dict[str, Any]]:
    """Yield a row for each patch embedding."""
    for size, channels in ((32, 4), (64, 4), (256, 3)):
        for width in (384, 768, 1152):
            for name, dtype in DTYPES.items():
                x = torch.randn(8, channels, size, size, device="cuda", dtype=dtype, requires_grad=True)
                w = torch.randn(width, channels, 2, 2, device="cuda", dtype=dtype, requires_grad=True)
                found = both_ways(lambda x=x, w=w: F.conv2d(x, w, stride=2), (x, w))  # type: ignore[misc]
                yield {"input": list(x.shape), "width": width, "dtype": name, **found}


def main(path: Path) -> None:
    """Examine all and write."""
    check_writable(path)
    content = {"attention": list(attention()), "convolution": list(convolution())}
    write_text(path, record_of(capture("cuda"), **content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
