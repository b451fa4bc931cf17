"""From drawn units to the physical batches of this process."""

import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from dit_dp.clipping.noise import entropy_size, generator_of
from dit_dp.clipping.units import ROW_TO_UNIT
from dit_dp.data import Examples
from dit_dp.objectives import Objective
from dit_dp.trainer.world import World

Batch = dict[str, Tensor]


class Sampler(Protocol):
    """Draws the units of a step."""

    def draw(self) -> Tensor:
        """Return the numbers of the units of all processes together, (n,) int64."""


class Feed:
    """Draws the units of a step, and makes batches of those that are this process's.

    Every process draws the same units and takes each `World.size`-th of them, so that a unit is on one process. Times,
    noise and label drops of the objective come from a generator of the process's own; what the next batch needs is read
    while this one is trained on.

    Args:
        data: Privacy units.
        objective: What batches are for.
        sampler: In the same state in every process.
        world: This process among the others.
        physical: Largest number of units in a batch; `None`: all.
        in_step: Whether all processes must take as many batches, so that some may be empty.
        insecure_seed: For tests: all randomness of a step's batch follows from it and the number of the step, for all
            processes' units at once, so that one process and several train on the same numbers.
    """

    def __init__(
        self,
        data: Examples,
        objective: Objective,
        sampler: Sampler,
        world: World,
        *,
        physical: int | None,
        in_step: bool,
        insecure_seed: int | None,
    ) -> None:
        self._data, self._objective, self._sampler, self._world = data, objective, sampler, world
        self._physical, self._in_step, self._seed = physical, in_step, insecure_seed
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._generator = generator_of(_entropy(world.device), world.device)
        self.num_drawn = 0

    def batches(self, step: int) -> Iterator[Batch]:
        """Draw the units of a step; yield the batches of this process, at least one."""
        units = self._sampler.draw()
        self.num_drawn = len(units)
        world = self._world
        own = torch.arange(world.rank, len(units), world.size)
        parts = list(torch.split(own, self._physical or max(1, len(own))))
        if self._in_step:
            largest = -(-len(units) // world.size)
            wanted = max(1, -(-largest // (self._physical or max(1, largest))))
            parts += [own[:0]] * (wanted - len(parts))
        if self._seed is not None:
            whole = self._drawn(units, torch.Generator(world.device).manual_seed(self._seed * 1_000_003 + step))
            yield from (self._rows_of(whole, part) for part in parts)
            return
        ahead: Future[tuple[Tensor, Tensor | None]] = self._reader.submit(self._data.take, units[parts[0]])
        for number in range(len(parts)):
            x, labels = ahead.result()
            if number + 1 < len(parts):
                ahead = self._reader.submit(self._data.take, units[parts[number + 1]])
            yield self._batch(x, labels, self._generator)

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(cancel_futures=True)

    def _drawn(self, units: Tensor, generator: torch.Generator) -> Batch:
        """Return a batch of some units."""
        return self._batch(*self._data.take(units), generator)

    def _batch(self, x: Tensor, labels: Tensor | None, generator: torch.Generator) -> Batch:
        device = self._world.device
        labels = None if labels is None else labels.to(device)
        return self._objective.draw(x.to(device), labels, generator)

    def _rows_of(self, whole: Batch, part: Tensor) -> Batch:
        """Return some units' rows of a batch."""
        rows = self._objective.config.rows_per_unit
        index = (part[:, None] * rows + torch.arange(rows)).flatten().to(self._world.device)
        batch = {name: tensor[index] for name, tensor in whole.items()}
        if ROW_TO_UNIT in batch:
            batch[ROW_TO_UNIT] = torch.arange(len(part), device=index.device).repeat_interleave(rows)
        return batch


def _entropy(device: torch.device) -> bytes:
    """Return as much of the operating system's entropy as a generator of the device takes."""
    return secrets.token_bytes(entropy_size(device))
