"""The processes that train together: this one, its device, and how the others are reached."""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dit_dp.console import WORLD_VARIABLES, speaks_here, started_by_torchrun
from dit_dp.errors import UsageError

T = TypeVar("T")

_SAID = "said_why"
"""In the store: how many processes had a mistake to report."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands.

    Attributes:
        rank: Of this process.
        size: Number of processes.
        device: Where it trains.
        group: Of all processes; `None` if it is alone.
        control: Of all processes, for numbers on the CPU, so that no device waits for them.
        store: Of all processes, which answers each of them whatever became of the others.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    control: dist.ProcessGroup | None = None
    store: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def shared(self, value: Any) -> Any:
        """Return the first process's value; plain data."""
        if self.group is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, group=self.group, group_src=0)
        return held[0]

    def entropy(self, size: int) -> bytes:
        """Return bytes from the operating system, the same in every process."""
        drawn: bytes = self.shared(secrets.token_bytes(size))
        return drawn

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the processes."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers; their devices do not wait for it."""
        if self.group is None:
            return number
        held = torch.tensor(number)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.control or self.group)
        return int(held)

    def first(self, make: Callable[[], T]) -> T | None:
        """Have the first process make something; the others go on when it is made; their devices do not wait for it.

        Returns:
            In the first process what was made, in the others `None`.

        Raises:
            UsageError: It could not be made. The first process says so; the others end without a word.
        """
        made: T | None = None
        failure: Exception | None = None
        if self.leads:
            try:
                made = make()
            except (UsageError, OSError) as error:
                failure = error
        if self.largest(failure is not None):
            raise failure or SystemExit(2)
        return made

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Let one process say why all of them end, as the first that fails says it; the others end without a word.

        No process waits for another. One whose partner left in the middle of a step, because of what it has said, is
        told so by a `RuntimeError`, and has nothing to add either.
        """
        try:
            yield
        except (UsageError, OSError):
            if self.store is not None and self.store.add(_SAID, 1) > 1:
                raise SystemExit(2) from None
            raise
        except RuntimeError:
            if self.store is not None and self.store.add(_SAID, 0) > 0:
                raise SystemExit(2) from None
            raise


def join_world(device: str) -> World:
    """Return where this process stands, joining the others if torchrun started it.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        UsageError: There is no such device, or fewer than processes on this machine. One process of a
            machine says so; its others end without a word.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        if not speaks_here():
            raise SystemExit(2)
        raise UsageError.for_value("device", device, "cpu", "torch finds no CUDA device")
    if not started_by_torchrun():
        return World(rank=0, size=1, device=torch.device(device), group=None)
    rank, size, local = (int(os.environ[name]) for name in WORLD_VARIABLES)
    if device == "cuda":
        if local > torch.cuda.device_count():
            raise SystemExit(2)
        if local == torch.cuda.device_count():
            fix = f"this machine has {torch.cuda.device_count()} CUDA devices"
            raise UsageError.for_value("devices", local + 1, f"at most {torch.cuda.device_count()}", fix)
        torch.cuda.set_device(local)
    torch.optim.SGD([torch.zeros(1)])  # what it imports would hold the group beyond its end, if it were there already
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    control = dist.new_group(backend="gloo") if device == "cuda" else dist.group.WORLD
    return World(rank=rank, size=size, device=place, group=dist.group.WORLD, control=control, store=store)


def leave_world(world: World) -> None:
    """Part from the others."""
    if world.group is not None:
        dist.destroy_process_group()


def launch(devices: int, argv: Sequence[str]) -> int:
    """Have torchrun start one process a device with the same arguments.

    Returns:
        The exit code of a process that failed, or a shell's for the signal that ended them; they have said why
        themselves. 0: none of this. Gloo may abort a process whose partner has said why and left: 134, if that is seen
        first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a traceback of its own for each failure
    try:
        main(["--standalone", f"--nproc_per_node={devices}", "-m", "dit_dp.train", *argv])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        code = next((code for code in codes if code > 0), error.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code  # as a shell says it of a signal
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
