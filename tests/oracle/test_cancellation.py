"""Positions that cancel: a Gram sum in float32 keeps little of the norm, and no contribution may exceed C by that."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.contributions import Outer, Rows
from dit_dp.clipping.tiled import squared_norms

POSITIONS, WIDTH, UNITS = 16, 128, 8
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ghost", {}),
    ("bookkeeping", {"keep_up_to": 0}),
    ("bookkeeping", {}),
    ("flash_clip", {}),
    ("flash_clip_bk", {}),
    ("per_layer", {}),
    ("lean", {}),
    ("auto", {}),
    ("microbatch", {}),
]


def cancelling(share: float) -> tuple[Tensor, Tensor]:
    """Return inputs that are equal at all positions and output gradients of which a share is left in the sum."""
    generator = torch.Generator().manual_seed(5)
    x, direction = torch.randn(2, UNITS, 1, WIDTH, generator=generator)
    weights = torch.randn(UNITS, POSITIONS, 1, generator=generator)
    return x.expand(UNITS, POSITIONS, WIDTH), direction * (weights - weights.mean(1, keepdim=True) + share)


class Weighed(nn.Module):
    """A linear layer or a table of one row, of whose outputs the loss is a given linear function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Embedding(1, WIDTH) if kind == "embedding" else nn.Linear(WIDTH, WIDTH, bias=kind == "bias")

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the losses, (N,)."""
        x = x[..., 0].long() * 0 if isinstance(self.layer, nn.Embedding) else x
        return (self.layer(x) * g).sum((1, 2))


@pytest.mark.parametrize("kind", ["plain", "bias", "embedding"])
@pytest.mark.parametrize(("method", "settings"), METHODS, ids=lambda value: str(value))
def test_no_unit_contributes_more_than_c(method: str, settings: dict[str, Any], kind: str) -> None:
    x, g = cancelling(1e-4)
    g64, x64 = g.double().sum(1).norm(dim=1), x[:, 0].double().norm(dim=1)
    true = g64 if kind == "embedding" else g64 * (x64.square() + (kind == "bias")).sqrt()
    limit = float(true.median()) / 100
    engine = attach(Weighed(kind), method, max_grad_norm=limit, **settings)
    for unit in range(UNITS):
        batch = (x[unit : unit + 1], g[unit : unit + 1])
        engine.accumulate(lambda model, batch: model(*batch), batch)
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        grads = [parameter.grad for parameter in engine.parameters.values()]
        norm = float(torch.stack([grad.double().norm() for grad in grads if grad is not None]).norm())
        assert norm <= limit * (1 + 1e-4), f"unit {unit}: {norm / limit} C"
        engine.zero_grad()


@pytest.mark.parametrize("share", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_norm_is_never_too_small_and_exact_where_positions_do_not_cancel(
    share: float, dtype: torch.dtype
) -> None:
    a, g = (tensor.to(dtype) for tensor in cancelling(share))
    true = torch.einsum("ntp,ntd->npd", g.double(), a.double()).square().sum((1, 2))
    table = Rows(torch.zeros(UNITS, POSITIONS, dtype=torch.long), g)
    rows = g.double().sum(1).square().sum(1)
    for got, wanted in (
        (Outer(a, g).squared_norms("ghost"), true),
        (squared_norms(a, g), true),
        (table.squared_norms(), rows),
    ):
        assert (got.double() >= wanted * (1 - 1e-4)).all()
        if share == 1.0:
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
