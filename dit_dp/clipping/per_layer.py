"""Group-wise clipping: every layer to its own threshold, C / sqrt(groups), so that the whole stays within C.

McMahan, Ramage, Talwar and Zhang, "Learning differentially private recurrent language models" (arXiv 1710.06963),
per-layer clipping with equal shares. **Another mechanism than flat clipping**: the released sum has the same
sensitivity C and takes the same noise, but its direction is distorted, since small layers are clipped as hard as large.

A layer's factors are known as soon as its own output gradient is, so nothing is booked and no second pass made. Cost
over ordinary training: the norms (the smaller of 0.56 T^2 (d + p) and T d p multiply-adds a weight and example).
Memory: ordinary training's, and one layer's Gram matrices.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import clip_factors
from dit_dp.clipping.contributions import Contribution
from dit_dp.clipping.ghost import GhostEngine
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.precision import full_float32


class PerLayerEngine(GhostEngine):
    """Clipping by layer: a module's own parameters are a group; modules that share a parameter are one.

    **Guarantees**: each group adds at most C / sqrt(groups) per unit, so all together at most C. **Edge cases**: a unit
    is dropped from a group if its norm there is not finite, and counted once however many groups that is.
    """

    method: ClassVar[str] = "per_layer"
    walks_twice: ClassVar[bool] = False

    def _attach(self) -> None:
        self._waiting: dict[int, dict[nn.Parameter, list[Contribution]]] = {}
        self._totals: dict[nn.Parameter, Tensor] = {}
        super()._attach()
        groups: list[set[nn.Parameter]] = []
        for module in self.model.modules():
            group = {parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad}
            for other in [other for other in groups if other & group]:
                groups.remove(other)
                group |= other
            if group:
                groups.append(group)
        self._groups = groups
        self._group_of = {parameter: index for index, group in enumerate(groups) for parameter in group}

    @property
    def groups(self) -> list[list[str]]:
        """Names of parameters that are clipped together."""
        return [[name for name, p in self.model_parameters.items() if p in group] for group in self._groups]

    def _settle(self, parameter: nn.Parameter, parts: list[Contribution]) -> None:
        """Wait for the rest of the group, then clip and add it at once."""
        index = self._group_of[parameter]
        waiting = self._waiting.setdefault(index, {})
        waiting[parameter] = parts
        if waiting.keys() == self._groups[index]:
            self._clip(self._waiting.pop(index))

    def _clip(self, group: dict[nn.Parameter, list[Contribution]]) -> None:
        assert self._squares is not None
        squares = torch.stack([self._squared_norms(parameter, parts) for parameter, parts in group.items()]).sum(0)
        self._squares += squares
        norms = squares.sqrt()
        finite = torch.isfinite(norms)
        keep = None if hardware().holds(finite.all(), usually=True) else finite
        factors = clip_factors(norms, self.max_grad_norm / len(self._groups) ** 0.5)
        for parameter, parts in group.items():
            total: Tensor | None = None
            for part in parts:
                total = part.add_clipped(total, factors, parameter.shape, lambda: keep)
            assert total is not None
            self._totals[parameter] = self.ranks.share(parameter, total)

    def _take_norms(self, losses: Tensor) -> None:
        super()._take_norms(losses)
        with torch.no_grad(), full_float32():
            while self._waiting:  # groups of which the loss uses only a part
                self._clip(self._waiting.popitem()[1])

    def _sum(self, losses: Tensor) -> None:
        """Hand over what was added up during the backward, while `.grad` was watched for foreign gradients."""
        while self._totals:
            self._add_share(*self._totals.popitem())

    def _forget(self) -> None:
        super()._forget()
        self._waiting.clear()
        self._totals.clear()
