"""One private method on one case: its clipped sums over parts and changed versions of the case."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.engine import Engine
from memory_test.doctor.case import Case, Reference, flatten, refer


@dataclass(frozen=True)
class Clipped:
    """What a method returned.

    Attributes:
        total: `.grad` of all trainable parameters in one vector.
        norms: (U,) norms before clipping, or `None` where the method does not hand them out.
        num_dropped: Units that the engine counted as dropped.
    """

    total: Tensor
    norms: Tensor | None
    num_dropped: int


class Trial:
    """A method, a case and a threshold; every run has a fresh copy of the model.

    Attributes:
        case: What is examined.
        method: A key of `METHODS`.
        reference: The oracle's answer under flat clipping; gives the threshold.
        max_grad_norm: C.
        seed: Of `generator`.
        generator: Source of whatever a check draws.
    """

    def __init__(self, case: Case, method: str, reference: Reference, seed: int = 0) -> None:
        self.case, self.method, self.reference, self.seed = case, method, reference, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.num_units = case.num_units
        self.max_grad_norm = reference.max_grad_norm
        self._subsets: dict[tuple[int, ...], Clipped] = {}

    @cached_property
    def exact(self) -> Reference:
        """The oracle's answer under the method's own clipping: flat, or by groups of parameters."""
        if METHODS[self.method].flat:
            return self.reference
        return refer(self.case, self.max_grad_norm, self.attach().groups)

    def in_float64(self) -> "Trial":
        """Return the same trial on a float64 copy of the case."""
        return Trial(self.case.in_float64(), self.method, self.reference, self.seed)

    def attach(self) -> Engine:
        """Attach the method to a copy of the model."""
        return attach(copy.deepcopy(self.case.model), self.method, max_grad_norm=self.max_grad_norm)

    def run(self, *cases: Case) -> Clipped:
        """Return the clipped sum over a case's batch, or over several that one release is made of."""
        engine = self.attach()
        norms = [engine.accumulate(case.loss_fn, case.batch, case.row_to_unit) for case in cases]
        num_dropped = engine.num_dropped
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        known = [norm.detach() for norm in norms if norm is not None]
        return Clipped(released(engine), torch.cat(known) if len(known) == len(norms) else None, num_dropped)

    def subset(self, units: Sequence[int]) -> Clipped:
        """Return the clipped sum over these units of the case; remembered."""
        key = tuple(units)
        if key not in self._subsets:
            self._subsets[key] = self.run(self.case.take(key))
        return self._subsets[key]

    def everyone(self) -> Clipped:
        """Return the clipped sum over all units."""
        return self.subset(range(self.num_units))

    def without(self, unit: int) -> Clipped:
        """Return the clipped sum over all units but one."""
        return self.subset([other for other in range(self.num_units) if other != unit])

    def some_units(self, most: int = 4) -> list[int]:
        """Return units to remove or to change: all of them, or `most` drawn at random."""
        drawn = torch.randperm(self.num_units, generator=self.generator).tolist()
        return sorted(drawn[:most])

    def relative(self, difference: Tensor) -> float:
        """Return the length of a vector in units of C; infinity if it is not finite."""
        length = float(difference.double().norm()) / self.max_grad_norm
        return length if length == length else float("inf")


def released(engine: Engine) -> Tensor:
    """Return `.grad` of an engine's parameters as one vector, zeros where there is none."""
    parameters = engine.parameters.values()
    return flatten(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters).detach()
