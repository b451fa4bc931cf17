"""Clipping with recomputed blocks: the least memory in which a batch can be taken whole.

One-pass clipping ends its backward with 16 of the 20 h T numbers that a transformer block saves, so it cannot go below
ordinary training's memory. Here a block keeps its inputs only. Its backward recomputes it, takes its norms and drops
all but its output's gradient; when the clip factors are known it is recomputed once more and its clipped sum taken.

The backward is linear in each unit's gradient, so second visits need no chain: each starts from the output's gradient
that was kept, in any order, and no block's input gradient is computed again. Two blocks are spared a visit at no cost
in memory: the last keeps its graph from forward to backward, which is next, and the first books its operands, since
nothing follows that would need the room.

Operations of a block, in forwards: 1, then 1 + 1 and the norms (0.5 to 1), then 1 + 2 less its first layers' input
gradient; ordinary training's are 3. Memory: two h T per block and example for inputs and output gradients, one block's
activations and their gradients, and what is booked: biases, adaLN layers (T = 1), first block.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn
from dit_dp.clipping.blocks import Block, BlockCall, find_blocks, refuse_compiled_in_place, stand_in, uninstall
from dit_dp.clipping.bookkeeping import BookkeepingEngine, BookRule
from dit_dp.clipping.contributions import Contribution, Direct, Outer
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.lives import Trial
from dit_dp.clipping.probe import Prober
from dit_dp.clipping.units import Units


class LeanEngine(BookkeepingEngine):
    """Exact flat clipping with recomputed blocks: the members of `nn.ModuleList` and `nn.Sequential` chains.

    Performance setting `visit_in_halves`: the second visit of a block takes half of the units at a time.

    A block is differentiated by its inputs and outputs: it must not read tensors that need a gradient from elsewhere.
    Models without such a chain are clipped as `bookkeeping` does; `choices` says how many blocks there are.

    **Guarantees** and **edge cases**: as in `bookkeeping`; recomputation restores the state of random numbers and
    autocast, and repeats the same operations on the same inputs, so the norm and the sum see the same operands.
    """

    method: ClassVar[str] = "lean"
    anchor: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        on_phase: Callable[[str], None] | None = None,
        visit_in_halves: bool = True,
    ) -> None:
        self.visit_in_halves = visit_in_halves
        super().__init__(model, max_grad_norm=max_grad_norm, on_phase=on_phase)

    def _attach(self) -> None:
        self.num_received = 0
        self._inside: Block | None = None
        self._calls_to_revisit: list[BlockCall] = []
        self._kept: set[nn.Parameter] = set()
        self._booked: dict[nn.Parameter, list[bool]] = {}
        self._trials: tuple[Trial, ...] = ()
        self.blocks = [Block(name, module) for name, module in find_blocks(self.model)]
        self._choose_blocks()
        refuse_compiled_in_place(self.blocks)
        super()._attach()
        first = next(iter(self.model_parameters.values()))
        self.anchor = torch.zeros((), device=first.device, requires_grad=True)
        stand_in(self.blocks, self, everywhere=False)

    def _choose_blocks(self) -> None:
        """Say which blocks keep their graph and which book their operands before anything is known of the batch."""
        if self.blocks:
            self.blocks[0].booked = self.blocks[-1].stored = True

    def _detach(self) -> None:
        for block in reversed(self.blocks):
            if block.forward is not None:
                uninstall(block)
        super()._detach()

    # --- called by blocks -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def inside(self, block: Block) -> Iterator[None]:
        """Say that layers called or back-propagated meanwhile belong to a block."""
        outer, self._inside = self._inside, block
        try:
            yield
        finally:
            self._inside = outer

    @property
    def prober(self) -> Prober | None:
        """What runs blocks while there is a trial."""
        return self._prober

    def revisit(self, call: BlockCall) -> None:
        """Take note of a call that was differentiated for norms alone."""
        self._calls_to_revisit.append(call)

    def _try(self, loss_fn: LossFn, batch: Batch, units: Units) -> None:
        stand_in(self.blocks, self, everywhere=True)
        super()._try(loss_fn, batch, units)
        counts = range(1, min(2, units.num_units) + 1)
        self._trials = tuple(self._run_trial(loss_fn, batch, units, count) for count in counts)

    def _take(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        refuse_compiled_in_place(self.blocks)
        stand_in(self.blocks, self, everywhere=False)
        return super()._take(loss_fn, batch, units)

    # --- norms and sums -------------------------------------------------------------------------------------

    def receive(self, parameter: nn.Parameter, part: Contribution) -> None:
        """Take one contribution; on a second visit, add it unless it was booked on the first."""
        self.num_received += 1
        books = self._inside is None or self._inside.booked or _is_small(part)
        if self._factors is None:
            self._booked.setdefault(parameter, []).append(books)
        elif books or parameter in self._kept:
            return
        super().receive(parameter, part)

    def _note(self, parameter: nn.Parameter, parts: Sequence[Contribution]) -> None:
        books = self._booked.pop(parameter)
        if self._rules_used.get(self._names[parameter]) == "keep":
            self._kept.add(parameter)
            super()._note(parameter, parts)
        else:
            super()._note(parameter, [part for part, booked in zip(parts, books, strict=True) if booked])

    def _rule_for(self, parameter: nn.Parameter, outers: list[Outer]) -> BookRule:
        """Return the rule with fewest operations, and `keep` only where everything is booked and it saves memory."""
        if all(self._booked[parameter]):
            return super()._rule_for(parameter, outers)
        positions = sum(part.a.shape[1] for part in outers)
        return Outer.rule(positions, parameter[0].numel(), parameter.shape[0])

    def _sum(self, losses: Tensor) -> None:
        super()._sum(losses)
        while self._calls_to_revisit:
            self._visit(self._calls_to_revisit.pop())

    def _visit(self, call: BlockCall) -> None:
        """Take the clipped sum of a block's call, where it can be told how, half of the units after the other.

        A trial tells which inputs have rows: those whose first dimension is another for two units than for one.
        """
        units, factors, finite = self._units, self._factors, self._finite
        assert factors is not None
        assert finite is not None
        dims = [trial.leading.get(call.block.name) for trial in self._trials]
        sliced = [one != two for one, two in zip(*dims, strict=True)] if len(dims) == 2 and all(dims) else []
        halved = self.visit_in_halves and len(sliced) == len(call.leaves)
        for start, stop in units.halves() if halved else [(0, units.num_units)]:
            rows, self._units = units.span(start, stop)
            self._factors, self._finite = factors[start:stop], finite[start:stop]

            def part(tensor: Tensor, rows: slice = rows, chosen: slice = slice(start, stop)) -> Tensor:
                return tensor[rows] if tensor.shape[0] == units.num_rows else tensor[chosen]

            def walk(*what: object, part: Callable[[Tensor], Tensor] = part) -> None:
                call.differentiate_again(part, sliced if halved else [False] * len(call.leaves))

            if start == 0:
                walk()
            else:  # all gradients are there, so it takes the same in every step
                hardware().apply(walk, call.block.name, stop - start, tuple(call.leaves))
        self._units, self._factors, self._finite = units, factors, finite

    def _forget(self) -> None:
        super()._forget()
        self._inside = None
        self._calls_to_revisit.clear()
        self._kept.clear()
        self._booked.clear()

    def choices(self) -> dict[str, Any]:
        """Return norm rules, and how many blocks are recomputed for the norms and for the sum."""
        recomputed = sum(not block.stored for block in self.blocks)
        again = sum(not block.booked for block in self.blocks)
        return {**super().choices(), "recomputed_blocks": recomputed, "revisited_blocks": again}


def _is_small(part: Contribution) -> bool:
    """Return whether a contribution is booked wherever it comes from: gradients of vectors, operands at T = 1."""
    return isinstance(part, Direct) or (isinstance(part, Outer) and part.a.shape[1] == 1)
