"""One-pass clipping: a single backward that books what the clipped sum will need.

Bu, Wang, Zha and Karypis, "Differentially private optimization on large foundation models at scale" (arXiv
2210.00038), book-keeping; with per-example gradients kept where they are no larger than what they are made of.

The backward computes input gradients and norms, never a parameter's gradient. Per weight it books either

- *keep*: the per-example gradients, N d p numbers, formed once: the norm reads them, the clipped sum is their
  weighted sum, and the layer's input and output gradient are freed at once; or
- the layer's input and output gradient, N T (d + p) numbers: the norm comes from Gram matrices by their upper
  triangle (0.56 T^2 (d + p) multiply-adds an example), and the clipped sum is one matrix product (T d p).

Operations over ordinary training: none with keep but two reads of the kept gradients; the Gram matrices otherwise,
0.56 T (d + p) / (3 d p) of a layer's own. Memory at the end of the backward: what is booked, less the
activations the backward has freed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.clipping import tiled
from dit_dp.clipping.contributions import Contribution, Direct, Outer, float32, joined, joined_squared_norms
from dit_dp.clipping.engine import LayerRule
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.precision import full_float32
from dit_dp.clipping.watched import WatchedEngine

BookRule = Literal["keep", "ghost", "direct", "tiled", "outer product"]
"""How a weight's norm is taken; all but `keep` book its operands."""

AHEAD = 32
"""So many small sums that ask whether every unit is finite, and wait for a GPU, go after others that keep it busy."""

SMALL = 2**20
"""Numbers of operands up to which a sum is small."""

SIDE_BY_SIDE = {False: 2**20, True: 2**24}
"""So many numbers of gradients of biases and scales are taken together, by whether it is CUDA.

Each by itself is a handful of tiny operations: on a GPU launches, on a CPU an interpreter whose caches products of
matrices have just filled. Side by side they are copied once, which takes as much memory again for a moment."""

KEEP_UP_TO = 1.25
"""Keeping spares the Gram matrices, 6 to 22 % of a step's operations, and is worth that much more memory."""


class BookkeepingEngine(WatchedEngine):
    """Exact flat clipping in one backward pass.

    Performance setting `keep_up_to`: per-example gradients of a weight are kept if they take at most this many times
    the memory of its input and output gradient; 0 never keeps, infinity always does.

    **Guarantees**: adds at most C per unit, up to float32 rounding, under bf16 too: the norm and the sum see the same
    operands. **Edge cases**: as in `ghost`.
    """

    method: ClassVar[str] = "bookkeeping"

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        on_phase: Callable[[str], None] | None = None,
        keep_up_to: float = KEEP_UP_TO,
    ) -> None:
        validate.at_least("keep_up_to", keep_up_to, 0)
        self.keep_up_to = keep_up_to
        super().__init__(model, max_grad_norm=max_grad_norm, on_phase=on_phase)

    def _attach(self) -> None:
        self._book: list[tuple[nn.Parameter, Contribution]] = []
        self._vectors: list[tuple[nn.Parameter, Direct]] = []
        self._num_waiting = 0
        self._joined: list[tuple[list[nn.Parameter], Direct]] = []
        super()._attach()

    def _take_norms(self, losses: Tensor) -> None:
        super()._take_norms(losses)
        with torch.no_grad():
            self._join_vectors()

    def _sum(self, losses: Tensor) -> None:
        waiting: list[tuple[nn.Parameter, Contribution]] = []
        with full_float32():
            while self._book:  # newest first, freed as it goes
                parameter, part = self._book.pop()
                if len(waiting) < AHEAD and hardware().is_cuda(losses) and _asks(part):
                    waiting.append((parameter, part))
                else:
                    self._add(parameter, part)
            while waiting:
                self._add(*waiting.pop())
            for parameter, total in self._joined_sums():
                self._deposit(parameter, total)

    def _joined_sums(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the clipped sums of the gradients that were taken side by side, which are freed."""
        assert self._factors is not None
        while self._joined:
            parameters, side_by_side = self._joined.pop()
            total = side_by_side.add_clipped(None, self._factors, side_by_side.value.shape[1:], self._kept_units)
            sizes = [parameter.numel() for parameter in parameters]
            parts: Sequence[Tensor] = torch.split_with_sizes_copy(total, sizes)  # type: ignore[func-returns-value,assignment]
            for parameter, part in zip(parameters, parts, strict=True):
                yield parameter, part.view(parameter.shape)

    def _joins(self, parameter: nn.Parameter, part: Direct) -> bool:
        """Have a small gradient wait for others; return whether it does."""
        limit = SIDE_BY_SIDE[hardware().is_cuda(part.value)]
        if part.value.numel() > limit:
            return False
        self._vectors.append((parameter, part))
        self._num_waiting += part.value.numel()
        if self._num_waiting > limit:
            self._join_vectors()
        return True

    def _join_vectors(self) -> None:
        """Take the norms of the gradients that wait, side by side as if one parameter's, and book them so."""
        if self._vectors:
            assert self._squares is not None
            parameters = [parameter for parameter, _ in self._vectors]
            rows = [float32(part.value).reshape(len(part.value), p.numel()) for p, part in self._vectors]
            side_by_side = Direct(torch.cat(rows, 1))
            self._vectors.clear()
            self._num_waiting = 0
            self._squares += side_by_side.squared_norms()
            self._joined.append((parameters, side_by_side))

    def _forget(self) -> None:
        super()._forget()
        self._book.clear()
        self._vectors.clear()
        self._num_waiting = 0
        self._joined.clear()

    def _settle(self, parameter: nn.Parameter, parts: list[Contribution]) -> None:
        assert self._squares is not None
        if len(parts) == 1 and isinstance(parts[0], Direct) and self._joins(parameter, parts[0]):
            return
        outers = [part for part in parts if isinstance(part, Outer)]
        if len(outers) < len(parts):  # rows of an embedding, biases and scales, or a mixture
            self._squares += joined_squared_norms(parts, parameter.shape)
            self._note(parameter, parts)
            return
        rule = self._rule_for(parameter, outers)
        self._rules_used[self._names[parameter]] = rule
        if rule == "keep":
            first, *others = outers
            kept, squares = first.kept(parameter.shape)
            for part in others:
                kept.value.add_(part.gradients(parameter.shape))
            self._squares += kept.rowwise_squared_norms() if others else squares
            self._note(parameter, [kept])
        else:
            whole = joined(outers)
            if rule == "tiled":
                self._squares += tiled.squared_norms(whole.a, whole.g)
            else:
                self._squares += whole.squared_norms(rule)
            self._note(parameter, parts)

    def _rule_for(self, parameter: nn.Parameter, outers: list[Outer]) -> BookRule:
        """Return how the norm of a weight is taken, and with it what is booked."""
        positions = sum(part.a.shape[1] for part in outers)
        if positions == 1:
            return "outer product"
        operand = outers[0].a.element_size()
        limit = self.keep_up_to * operand / max(4, operand)  # gradients are float32 where operands are bf16
        return "keep" if _keeps(positions, parameter.shape[1:].numel(), parameter.shape[0], limit) else "ghost"

    def _note(self, parameter: nn.Parameter, parts: Sequence[Contribution]) -> None:
        """Book what the clipped sum of a parameter is made of."""
        self._book.extend((parameter, part) for part in parts)

    @classmethod
    def norm_rule(cls, positions: int, width: int, out_width: int) -> tuple[LayerRule, str]:
        """Return the rule under the default `keep_up_to`, for float32 operands."""
        if positions == 1:
            return "outer product", "T = 1: |input| · |output gradient|"
        if _keeps(positions, width, out_width, KEEP_UP_TO):
            return "keep", f"per-example gradients kept, as d·p ≤ {KEEP_UP_TO} T(d + p)"
        return "ghost", f"Gram matrices of T positions, as d·p > {KEEP_UP_TO} T(d + p)"

    def tracked_tensors(self) -> Any:
        """Yield what is booked: kept gradients, and operands held for the clipped sum."""
        for _, part in (*self._book, *self._vectors, *self._joined):
            if isinstance(part, Direct):
                yield "per_example_gradients", part.value
            elif isinstance(part, Outer):
                yield "kept_for_clipping", part.a
                yield "kept_for_clipping", part.g


def _asks(part: Contribution) -> bool:
    """Return whether a small sum asks which units count: a kernel's need not, and what is large is freed at once."""
    if isinstance(part, Outer):
        return not part.by_kernel and part.a.numel() + part.g.numel() <= SMALL
    return (part.value if isinstance(part, Direct) else part.g).numel() <= SMALL


def _keeps(positions: int, width: int, out_width: int, keep_up_to: float) -> bool:
    """Return whether per-example gradients (d p) are kept rather than operands (T (d + p))."""
    return positions > 1 and width * out_width <= keep_up_to * positions * (width + out_width)
