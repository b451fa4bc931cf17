"""One configuration on the emulated runtime: the product's memory pass, run by torch's CUDA build.

A process of its own, started on the runtime, with a request on its standard input: ``resolved``, of `ExperimentConfig`,
and ``settings``, the allocator's. Its answer is the last line of its standard output. Where something depends on data,
of which the device has none, it does what a prediction does.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.hardware import Hardware, imagined
from memory_test.core.measure import measure_memory
from memory_test.predict.cards import CARDS
from memory_test.predict.emulator.events import compare
from memory_test.predict.emulator.record import numbers
from memory_test.predict.fakes import STAND_INS
from memory_test.predict.roofline import Rates, rule_seconds
from memory_test.predict.settings import AllocatorSettings


class EmulatedHardware(Hardware):
    """Answers as usual what data decides, since there are none; rules cost what counting says."""

    def __init__(self) -> None:
        self.rule_seconds = rule_seconds(Rates.ceilings(CARDS["H100-80GB"]))

    def holds(self, condition: Tensor, *, usually: bool) -> bool:
        """Return the usual answer."""
        return usually

    def later(self, condition: Tensor, *, usually: bool) -> Callable[[], bool]:
        """Return who gives the usual answer."""
        return lambda: usually


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Do nothing where only values would come of it, or where an operation's result depends on them."""
    drawn = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    changes: list[tuple[Any, str, Any]] = [(nn.init, name, lambda tensor, *args, **kwargs: tensor) for name in drawn]
    with contextlib.suppress(ImportError):  # a launch allocates nothing
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        changes += [(kind, "run", lambda *args, **kwargs: None) for kind in (Autotuner, JITFunction)]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, stand_in in STAND_INS.items():
            library.impl(name, stand_in, "CUDA")
    try:
        with imagined(EmulatedHardware()):
            yield
    finally:
        library._destroy()
        for place, name, value in before:
            setattr(place, name, value)


def pin_kernels() -> None:
    """Leave out cuDNN, which is not emulated: attention takes flash or memory-efficient, convolution its own kernel."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def kept_snapshots() -> list[Any]:
    """Have every memory snapshot that is taken kept in the list returned."""
    kept: list[Any] = []
    place: Any = torch.cuda.memory
    take: Callable[..., Any] = place._snapshot

    def snapshot(*args: Any) -> Any:
        kept.append(take(*args))
        return kept[-1]

    place._snapshot = snapshot
    return kept


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what was asked for."""
    settings = AllocatorSettings(**request["settings"])
    pin_kernels()
    if settings.memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(settings.memory_fraction)
    snapshots = kept_snapshots()
    try:
        with without_data():
            measured = measure_memory(request["resolved"], lambda phase: None)
    except torch.OutOfMemoryError as error:
        return {"status": "oom", "error": str(error).splitlines()[0]}
    stats = torch.cuda.memory_stats()
    history, capacity = snapshots[-1]["device_traces"][0], torch.cuda.mem_get_info()[1]
    actions, difference = compare(history, settings, capacity)
    return {
        "status": "ok",
        **numbers(measured),
        "retries": stats["num_alloc_retries"],
        "actions": actions,
        "first_difference": difference,
    }


def main() -> None:
    """Answer one request."""
    result = answer(json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # nothing on the device is worth an orderly end


if __name__ == "__main__":
    main()
