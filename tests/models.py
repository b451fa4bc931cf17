"""Small models of every layer kind, each with a batch and a per-example loss, for oracles and properties."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from memory_test.doctor.case import Case
from tests import raw_models

DIFFUSERS: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
"""Arguments of the smallest `DiTTransformer2DModel` that has everything: 2 blocks, width 16, 16 tokens, 10 labels."""


class Tokens(nn.Module):
    """Linears over one, two and three leading dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 24)
        self.narrow = nn.Linear(24, 2, bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.narrow(F.gelu(self.wide(x))).mean(1))


class Convs(nn.Module):
    """Patch embedding, general convolution, groups, GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.conv = nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 4, 3, padding=1, stride=2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(F.silu(self.norm(self.conv(self.patch(x))))).flatten(1)


class Words(nn.Module):
    """Embeddings by word and by example, LayerNorm and RMSNorm with affine."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.label = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, words: Tensor, label: Tensor) -> Tensor:
        hidden = self.norm(self.words(words)) + self.label(label)[:, None]
        return self.out(self.rms(hidden)).sum(1)


class Padded(nn.Module):
    """An embedding whose padding row takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=0)
        self.out = nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.words(words)).sum(1)


class Reused(nn.Module):
    """One layer called three times with different numbers of positions; a linear tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.shared = nn.Linear(6, 6)
        self.logits = nn.Linear(6, 7, bias=False)
        self.logits.weight = self.words.weight

    def forward(self, words: Tensor, label: Tensor) -> Tensor:
        hidden = self.words(words)
        hidden = hidden + torch.tanh(self.shared(hidden))
        pooled = self.shared(self.shared(hidden).mean(1))
        return self.logits(pooled) * (1 + label[:, None])


class Frozen(nn.Module):
    """A frozen layer, a layer with only its bias training, and a layer the output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8).requires_grad_(False)
        self.bias_only = nn.Linear(8, 4)
        self.bias_only.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bias_only(torch.relu(self.middle(self.first(x)))).flatten(1)


class _Residual(nn.Module):
    """A block that takes a keyword and returns two tensors; its inner layer may be another block's too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.up, self.shared, self.down = nn.Linear(6, 12), shared, nn.Linear(12, 6)
        self.gate = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, condition: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(self.up(self.shared(x)))
        condition = torch.tanh(self.gate(condition))
        return x + condition[:, None] * self.down(hidden), condition


class Blocks(nn.Module):
    """A chain of blocks with a layer that all share, the head too, and a weight tied across two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.chain = nn.ModuleList([_Residual(self.shared) for _ in range(4)])
        self.chain[2].up.weight = self.chain[1].up.weight  # type: ignore[union-attr, assignment]
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.chain:
            x, condition = block(x, condition=condition)
        return self.head(self.shared(x) + condition[:, None]).sum(1)


def groups_of(model: nn.Module, method: str) -> list[list[str]] | None:
    """Return the groups by which a method clips a model, for the oracle."""
    if METHODS[method].flat:
        return None
    engine = attach(model, method)
    engine.detach()
    return engine.groups


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    assert not isinstance(batch, dict)
    *inputs, target = batch
    return (model(*inputs) - target).square().mean(1)


def make_case(kind: str, num_examples: int = 4, seed: int = 0) -> Case:
    """Build a case of one of `KINDS` in float32."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    n = num_examples

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    words = torch.randint(0, 7, (n, 5), generator=generator)
    label = torch.randint(0, 5, (n,), generator=generator)
    scale = torch.logspace(-1, 1.5, n).view(-1, 1) if n else torch.zeros(0, 1)
    cases: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
        "tokens": lambda: (Tokens(), (normal(n, 5, 6), scale * normal(n, 3))),
        "vectors": lambda: (
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
            (normal(n, 6), normal(n, 3)),
        ),
        "convs": lambda: (Convs(), (normal(n, 3, 8, 8), scale * normal(n, 16))),
        "words": lambda: (Words(), (words, label, scale * normal(n, 3))),
        "padded": lambda: (Padded(), (words, scale * normal(n, 3))),
        "reused": lambda: (Reused(), (words, label, scale * normal(n, 7))),
        "blocks": lambda: (Blocks(), (normal(n, 9, 6), normal(n, 6), scale * normal(n, 3))),
        "frozen": lambda: (Frozen(), (normal(n, 3, 6), scale * normal(n, 12))),
        "positions": lambda: (raw_models.Positions(), (normal(n, 6, 6), scale * normal(n, 3))),
        "prefix": lambda: (raw_models.Prefix(), (normal(n, 5, 6), scale * normal(n, 3))),
        "scales": lambda: (raw_models.Scales(), (normal(n, 5, 6), scale * normal(n, 3))),
        "adapters": lambda: (raw_models.Adapters(), (normal(n, 5, 6), scale * normal(n, 3))),
        "raw layers": lambda: (raw_models.RawLayers(), (words, label, scale * normal(n, 3))),
        "keywords": lambda: (raw_models.Called(), (normal(n, 5, 6), normal(n, 6), scale * normal(n, 6))),
    }
    model, batch = cases[kind]()
    return Case(model, batch, _loss)


KINDS = (
    *("tokens", "vectors", "convs", "words", "padded", "reused", "blocks", "frozen"),
    *raw_models.KINDS,
)
