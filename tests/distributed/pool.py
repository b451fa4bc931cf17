"""Two processes of a gloo group that live through all tests of this folder: starting them takes seconds."""

import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2
TIMEOUT_S = 60.0


class Pool:
    """Runs a function on both ranks at once; a failure ends the processes, and the next call starts new ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks: list[tuple[Any, Any]] = []
        self._starts = 0

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``function(*args)`` of each rank; it must be a module's own, and its results small plain data."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args))
        found = [pipe.recv() if pipe.poll(TIMEOUT_S) else (False, "no answer") for _, pipe in self._ranks]
        if not all(done for done, _ in found):
            self.close()
            raise AssertionError("\n".join(f"rank {r}: {what}" for r, (done, what) in enumerate(found) if not done))
        return [result for _, result in found]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        for rank in range(SIZE):
            here, there = context.Pipe()
            arguments = (rank, self._folder / f"meeting{self._starts}", there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()  # so that the death of the process ends a wait for it
            self._ranks.append((process, here))

    def close(self) -> None:
        """End both processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.terminate()
            process.join()
        self._ranks = []


def _serve(rank: int, meeting: Path, pipe: Any) -> None:
    """Answer calls until the pipe closes."""
    warnings.simplefilter("error")
    # Convs and Frozen return views; nothing is done to them in place, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # FSDP2's own hooks fire on layers whose inputs take no gradient.
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=30)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            sys.exit()
        try:
            answer = True, function(*args)
        except Exception:  # noqa: BLE001 - whatever it is, the parent's test reports it
            answer = False, traceback.format_exc()
        pipe.send(answer)


@cache
def alone() -> dist.ProcessGroup:
    """Return a group of this rank only; both ranks must have called it the first time together."""
    groups = [dist.new_group([rank]) for rank in range(SIZE)]
    return groups[dist.get_rank()]
