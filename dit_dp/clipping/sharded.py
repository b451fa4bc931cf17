"""`ghost_fsdp_bk`: book-keeping under FSDP2.

FSDP2 frees a layer's weights when its backward ends; the clipped sum can be taken only when all backwards have, since
the factors need every layer's norm. Book-keeping does not miss the weights: what it booked is enough.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.bookkeeping import BookkeepingEngine
from dit_dp.clipping.contributions import Contribution
from dit_dp.clipping.precision import full_float32


class ShardedBookkeepingEngine(BookkeepingEngine):
    """Exact flat clipping in one backward pass over parameters that FSDP2 has sharded; `bookkeeping` where it has not.

    Per parameter, in the same order on every rank: form the clipped sum of this rank's units at full shape in float32,
    reduce-scatter it by summing, drop it. With P parameters on W ranks, in bytes for float32 at the end of the
    backward: 4 P / W for the shards, 4 P / W for their gradients, what is booked (as `bookkeeping`, for this rank's
    units), and 4 max_l d_l p_l for the one full-shape sum; twice that where W does not divide the sharded dimension,
    which is padded. FSDP2's gathered weights are gone by then, but for the root's own if it keeps them. Communicated
    a rank: FSDP2's all-gathers, and 4 P (W - 1) / W bytes reduce-scattered, as much as ordinary training's in float32.

    Ranks run in step: each must call `accumulate` equally often. One whose batch is empty takes part with a unit of
    zeros, which adds nothing.

    **Guarantees** and **edge cases**: as in `bookkeeping`. Norms need no communication: each unit lives on one rank.
    """

    method: ClassVar[str] = "ghost_fsdp_bk"

    def _sum(self, losses: Tensor) -> None:
        booked: dict[nn.Parameter, list[Contribution]] = {}
        while self._book:
            parameter, part = self._book.pop()
            booked.setdefault(parameter, []).append(part)
        assert self._factors is not None
        with full_float32():
            joined = dict(self._joined_sums())
            for parameter in reversed(self.model_parameters.values()):
                total = joined.pop(parameter, None)
                parts = booked.pop(parameter, [])
                while parts:
                    total = parts.pop().add_clipped(total, self._factors, parameter.shape, self._kept_units)
                if total is None:  # this rank's units did not use it; others' may have
                    total = torch.zeros(parameter.shape, dtype=self._factors.dtype, device=losses.device)
                self._deposit(parameter, total)
