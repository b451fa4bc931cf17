"""Whether one unit's loss has a gradient at another's rows, which would leave no per-unit gradient to clip."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from dit_dp.clipping.batch import gradients_aside
from dit_dp.clipping.compiled import donates, walking_twice
from dit_dp.clipping.contributions import Contribution, Direct, Outer
from dit_dp.clipping.graph import nodes_of
from dit_dp.clipping.hardware import hardware
from dit_dp.errors import CoupledExamplesError


def require_apart(unit: int, where: str, gradient: Tensor) -> None:
    """Refuse a gradient of one unit's loss, (U, ...), in which rows other than that unit's are not exactly zero.

    Raises:
        CoupledExamplesError: Some are not; says where.
    """
    if len(gradient) <= unit:
        return
    others = torch.cat([gradient[:unit], gradient[unit + 1 :]])
    reached = others.nan_to_num(nan=0.0)  # zero times an infinite derivative is NaN
    if hardware().holds(reached.any(), usually=False):
        raise CoupledExamplesError(
            f"model: the loss of one example depends on another's rows (seen at {where}), so no per-example "
            f"gradient exists; take out what mixes the batch, such as BatchNorm or a mean over the first dimension"
        )


def nonzero_rows(part: Contribution) -> Tensor:
    """Return a tensor, (U, ...), whose rows are zero where a contribution's are; either operand may be the gradient."""
    if isinstance(part, Outer):
        return part.g * part.a.flatten(1).any(1)[:, None, None]
    return part.value if isinstance(part, Direct) else part.g


def can_walk_again(losses: Tensor, *, walks_twice: bool) -> bool:
    """Return whether a graph can be walked once more than a method does without breaking what works.

    It cannot where a part was compiled to write over what it saved; nor, for a method that walks it once, where an
    autograd function of neither torch nor this package may let go of what it saved.
    """
    if donates(losses):
        return False
    return walks_twice or not any(map(_is_foreign, nodes_of(losses)))


def _is_foreign(node: Any) -> bool:
    function = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
    return function is not None and function.__module__.partition(".")[0] not in ("torch", "dit_dp")


class Look:
    """A look at the graph of losses: walked from one loss alone, it must not reach other units' rows.

    What is found is kept until all was walked: ranks that run in step walk equally far.
    """

    def __init__(self) -> None:
        self.error: CoupledExamplesError | None = None
        self._unit = 0

    def walk(self, losses: Tensor, unit: int, method: str) -> None:
        """Back-propagate one loss of several and keep the graph; leaves get nothing."""
        self._unit = unit
        leaves = (node.variable for node in nodes_of(losses) if hasattr(node, "variable"))
        with walking_twice(losses, method), gradients_aside(leaves):
            torch.autograd.backward(losses[unit], retain_graph=True)

    def saw(self, name: str, part: Contribution) -> None:
        """Take note of what a parameter gets, (U, ...)."""
        try:
            require_apart(self._unit, f"parameter {name}", nonzero_rows(part))
        except CoupledExamplesError as error:
            self.error = self.error or error
