"""Building blocks of random models: what each turns which kind of features into.

Shapes: N examples, T tokens, D features, C channels, H x W positions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Lambda(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Scaled(nn.Module):
    """A positive scale made of a raw parameter, and a raw shift with an example dimension of one."""

    def __init__(self, scale: tuple[int, ...], shift: tuple[int, ...], *, twice: bool) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(scale)), nn.Parameter(torch.randn(shift))
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = x * F.softplus(self.scale) + self.shift
        return torch.tanh(x) * self.scale if self.twice else x


class Prefix(nn.Module):
    """Learned tokens before the others."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, count, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1)


class Mixer(nn.Module):
    """A piece over positions instead of features: the inner linear gets a tensor that is not contiguous."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention over tokens (N, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], 3, self.num_heads, -1)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Repeated(nn.Module):
    """One piece called several times, the last time on what may have fewer positions."""

    def __init__(self, inner: nn.Module, times: int, pool: bool) -> None:
        super().__init__()
        self.inner, self.times, self.pool = inner, times, pool

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times - 1):
            x = torch.tanh(self.inner(x))
        return x + self.inner(x.mean(1))[:, None] if self.pool else x + self.inner(x)


class Tied(nn.Module):
    """Two linears that share a weight, each with a bias of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Checkpointed(nn.Module):
    """A piece that is recomputed in the backward pass."""

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant and not x.requires_grad:  # torch would give the inner parameters no gradient
            return self.inner(x)
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return result


class Words(nn.Module):
    """An embedding of indices (N, T), added to one of labels (N,) by its first word; logits may be tied to it."""

    def __init__(self, num_words: int, width: int, *, padding: bool, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width, padding_idx=0 if padding else None)
        self.label = nn.Embedding(num_words, width)
        self.tied = nn.Linear(width, num_words, bias=False) if tied else None
        if self.tied is not None:
            self.tied.weight = self.words.weight

    def forward(self, index: Tensor) -> Tensor:
        hidden = self.words(index) + self.label(index[:, 0])[:, None]
        if self.tied is None:
            return hidden
        return hidden + 0.1 * self.tied(hidden).tanh().sum(2, keepdim=True)


class Network(nn.Module):
    """Pieces one after the other; what is left is flattened and projected; one layer is never used."""

    def __init__(self, pieces: list[nn.Module], head: nn.Module, unused: nn.Module | None) -> None:
        super().__init__()
        self.pieces = nn.Sequential(*pieces)
        self.head = head
        self.unused = unused

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pieces(x).flatten(1))


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean squared error of each example, (N,)."""
    inputs, target = batch
    losses: Tensor = (model(inputs) - target).square().mean(1)
    return losses


def squared_error_of_units(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean over each unit's rows of their squared errors, (U,)."""
    losses = squared_error(model, (batch["inputs"], batch["target"]))
    ids = batch["row_to_unit"]
    sums = losses.new_zeros(int(ids.max()) + 1).index_add(0, ids, losses)
    return sums / ids.bincount()
