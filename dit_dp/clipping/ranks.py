"""Several processes, each with units of its own: what they exchange, and how the noise stays one.

A step over ranks is the step of one rank that holds everybody's units. A unit lives whole on one rank, so norms and
clip factors need no communication. Each rank accumulates its own units' clipped sum; `privatize` sums over the ranks
once, then every rank divides by the expected batch of all ranks together and adds the same noise, drawn from generators
in the same state. Added by each rank from a source of its own, the noise would have the variance of as many
draws, and the replicas would part.
"""

import hashlib
import secrets
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit_dp.clipping.noise import state_of
from dit_dp.errors import EngineStateError, UsageError


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is spread over ranks (a `DTensor`); any other as it is."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


class Ranks:
    """One process, which has nothing to exchange; its subclasses are the cases of several.

    Attributes:
        alone: Whether there is no other.
        in_step: Whether a forward or backward of one rank waits for the others', so that all must run as many.
    """

    alone = True
    in_step = False

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return True

    def enter(self) -> None:
        """Take note that an engine is attached."""

    def leave(self) -> None:
        """Undo `enter`."""

    def entropy(self, size: int) -> bytes:
        """Return random bytes from the operating system, the same on every rank."""
        return secrets.token_bytes(size)

    def gather(self, mine: Any) -> list[Any]:
        """Return every rank's value, the first rank's first; a collective call where there are several."""
        return [mine]

    def all_agree(self, yes: bool) -> bool:
        """Return whether every rank that runs in step says yes."""
        return yes

    def require_same(self, generator: torch.Generator | None, **values: float) -> None:
        """Refuse a source of noise, or other arguments, that are not the same on every rank."""

    def same(self, parameter: Tensor, attached: Tensor | None) -> bool:
        """Return whether a parameter found in the model is the one that was attached."""
        return parameter is attached

    def share(self, parameter: nn.Parameter, total: Tensor) -> Tensor:
        """Return what this rank puts into `.grad` of its clipped sum, which has the parameter's full shape."""
        return total

    def summed(self, parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
        """Yield each parameter once its `.grad` is the sum over the ranks."""
        yield from parameters

    def noise(self, parameter: nn.Parameter, std: float, generator: torch.Generator) -> Tensor:
        """Return this rank's part of Gaussian noise that was drawn at the parameter's full shape."""
        return torch.empty_like(parameter).normal_(0.0, std, generator=generator)


class Replicas(Ranks):
    """Ranks with the whole model each; sums are all-reduced.

    Args:
        groups: Process groups; exchanged over one after the other they reach every rank.
        wrapper: DDP around the model. Its own reduction, which would average, is switched off while attached.
    """

    alone = False

    def __init__(self, groups: Sequence[dist.ProcessGroup], wrapper: DistributedDataParallel | None = None) -> None:
        self._references = [weakref.ref(group) for group in groups]  # not to outlive destroy_process_group
        self._wrapper = wrapper
        self._before = (True, True)

    @property
    def _groups(self) -> list[dist.ProcessGroup]:
        groups = [reference() for reference in self._references]
        if None in groups:
            raise EngineStateError("engine: its process group was destroyed; attach again after init_process_group()")
        return [group for group in groups if group is not None]

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of every group."""
        return all(group.rank() == 0 for group in self._groups)

    def enter(self) -> None:
        """Have DDP neither reduce gradients nor broadcast buffers: a rank without units runs no forward."""
        if self._wrapper is not None:
            self._before = (self._wrapper.require_backward_grad_sync, self._wrapper.require_forward_param_sync)
            self._wrapper.require_backward_grad_sync = self._wrapper.require_forward_param_sync = False

    def leave(self) -> None:
        """Give DDP its reduction back."""
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync, self._wrapper.require_forward_param_sync = self._before

    def copy_first(self, model: nn.Module) -> None:
        """Give every rank the first one's parameters and buffers, as DDP does when it is built; shards are its own."""
        for tensor in (*model.parameters(), *model.buffers()):
            for group in () if hasattr(tensor, "device_mesh") else self._groups:
                dist.broadcast(tensor.detach(), group=group, group_src=0)

    def entropy(self, size: int) -> bytes:
        """Return the first rank's."""
        drawn = [super().entropy(size)]
        for group in self._groups:
            dist.broadcast_object_list(drawn, group=group, group_src=0)
        return drawn[0]

    def gather(self, mine: Any) -> list[Any]:
        """Ask every rank."""
        found = [mine]
        for group in self._groups:
            lists: list[list[Any]] = [[]] * group.size()
            dist.all_gather_object(lists, found, group=group)
            found = [value for values in lists for value in values]
        return found

    def require_same(self, generator: torch.Generator | None, **values: float) -> None:
        """Compare a fingerprint of the generator's state, and the other values.

        Raises:
            UsageError: On every rank, if any rank's differs.
        """
        state = b"" if generator is None else state_of(generator)
        fingerprint = hashlib.sha256(state).hexdigest()
        found = self.gather({**values, "generator": fingerprint})
        for name in (*values, "generator"):
            different = {rank[name] for rank in found}
            if len(different) > 1:
                got = f"{len(different)} different states" if name == "generator" else sorted(different)
                fix = "seed it alike on every rank, or leave it out" if name == "generator" else None
                raise UsageError.for_value(name, got, "the same on every rank", fix)

    def summed(self, parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
        """All-reduce; all are under way before the first is waited for, so that drawing noise overlaps with them."""
        pending = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pending.append((parameter, self._start_sum(parameter)))
        for parameter, work in pending:
            if work is not None:
                work.wait()
            yield parameter

    def _start_sum(self, parameter: nn.Parameter) -> dist.Work | None:
        """Sum over all groups but the last; start that one."""
        *first, last = self._groups
        for group in first:
            dist.all_reduce(parameter.grad, group=group)
        work: dist.Work = dist.all_reduce(parameter.grad, group=last, async_op=True)
        return work
