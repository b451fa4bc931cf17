"""Our methods under both kinds of activation checkpointing, also where a layer is called more than once."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import UnsupportedModelError
from tests.models import Case, groups_of, make_case
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit
from tests.oracle.test_methods import median_norm, relative_error

OURS = [name for name, method in METHODS.items() if method.private and not method.peer]
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


class Checkpointed(nn.Module):
    """A block that is recomputed in the backward."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.reentrant:
            return checkpoint(self.block, *args, use_reentrant=False, **kwargs)

        def positional(*tensors: Any) -> Any:  # the only arguments a reentrant checkpoint takes
            return self.block(*tensors[: len(args)], **dict(zip(kwargs, tensors[len(args) :], strict=True)))

        return checkpoint(positional, *args, *kwargs.values(), use_reentrant=True)


def wrap(chain: nn.ModuleList, indices: tuple[int, ...], reentrant: bool) -> None:
    for index in indices:
        chain[index] = Checkpointed(chain[index], reentrant)


def unwrapped(gradients: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".block.", "."): gradient for name, gradient in gradients.items()}


def check(model: nn.Module, case: Case, method: str, *, owns_forward: bool) -> None:
    """Compare with the oracle, which takes the same model without checkpoints: `case`."""
    threshold = median_norm(case)
    groups = groups_of(case.model, method)
    wanted, norms = clipped_sum(case.model, case.loss_fn, case.batch, threshold, groups=groups)
    engine = attach(model, method, max_grad_norm=threshold)
    if owns_forward:
        got = engine.accumulate(case.loss_fn, case.batch)
    else:
        got = engine.backward(case.loss_fn(model, case.batch))
    assert relative_error(unwrapped({name: p.grad for name, p in engine.parameters.items()}), wanted) < 1e-5
    torch.testing.assert_close(got.double(), norms, rtol=1e-5, atol=0)  # type: ignore[union-attr]


@BOTH
@pytest.mark.parametrize("method", OURS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # lean's first forward builds no graph
def test_blocks_of_the_dit(method: str, reentrant: bool) -> None:
    model = tiny_dit(depth=3)
    wrap(model.blocks, (0, 1, 2), reentrant)
    if method == "lean" and reentrant:
        with pytest.raises(UnsupportedModelError, match="lean recomputes the block anyway"):
            attach(model, method).accumulate(OBJECTIVE, draw())
        return
    check(model, Case(tiny_dit(depth=3), draw(), OBJECTIVE), method, owns_forward=True)


@pytest.mark.parametrize("method", OURS)
def test_shared_layers_and_recomputed_blocks(method: str) -> None:
    """All blocks and the head share a layer, two blocks a weight; two of the blocks are recomputed."""
    model = make_case("blocks").model
    wrap(model.chain, (1, 2), False)  # type: ignore[arg-type]
    check(model, make_case("blocks"), method, owns_forward=True)


@pytest.mark.parametrize("owns_forward", [True, False], ids=["accumulate", "backward"])
@pytest.mark.parametrize("method", [name for name in OURS if name not in ("microbatch", "lean")])
def test_calls_inside_a_reentrant_checkpoint(method: str, owns_forward: bool) -> None:
    """The forward builds no graph there; calls are counted all the same, so that cross terms are not lost."""
    model = make_case("blocks").model
    wrap(model.chain, (1, 2), True)  # type: ignore[arg-type]
    check(model, make_case("blocks"), method, owns_forward=owns_forward)
