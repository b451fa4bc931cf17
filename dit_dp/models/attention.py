"""Attention and MLPs of a transformer block, with the parameter names of timm.

Shapes: N examples, T tokens, S tokens that are attended to, D width, H heads, E width of a head, F hidden width of
the MLP.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_dp import validate


class Attention(nn.Module):
    """Multi-head self-attention through `F.scaled_dot_product_attention`.

    Args:
        dim: D, the width of a token.
        num_heads: H.
        head_dim: E; `None`: D/H, and H must divide D.
        scale: Factor on the logits; `None`: E^-0.5.
        qk_norm: Makes the norms of queries and keys, given E; `None`: there are none.
        local: Locality self-attention (arXiv 2112.13492): the logits' factor is learned, from E^-0.5 on, and no token
            attends to itself.

    Raises:
        UsageError: D is not a multiple of H.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        scale: float | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        local: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None:
            validate.divisible("hidden_size", dim, num_heads, f"it is split over num_heads={num_heads}")
            head_dim = dim // num_heads
        self.num_heads, self.scale = num_heads, 1.0 if local else scale
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.q_norm = None if qk_norm is None else qk_norm(head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(head_dim)
        self.temperature = nn.Parameter(torch.tensor(-0.5 * math.log(head_dim))) if local else None
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor, rope: nn.Module | None = None) -> Tensor:
        """Attend from every token to every token of the same example.

        Args:
            x: Tokens, (N, T, D).
            rope: Rotates queries and keys, (N, H, T, E), by their positions.

        Returns:
            Mixed tokens, (N, T, D).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, T, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, H, T, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        if rope is not None:
            q, k = rope(q), rope(k)
        mask = None
        if self.temperature is not None:
            q = q * self.temperature.exp()
            mask = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # (T, T)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norms, rotations and temperatures may be of float32
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)  # (N, H, T, E)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (N, T, D)
        return out


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Return a norm of x, taken in its weight's dtype: autocast sees to that for LayerNorm, not for RMSNorm."""
    weight = getattr(norm, "weight", None)
    out: Tensor = norm(x if weight is None else x.to(weight.dtype))
    return out


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to other tokens of the same example.

    Args:
        dim: D, the width of both kinds of tokens.
        num_heads: H; must divide D.

    Raises:
        UsageError: D is not a multiple of H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        validate.divisible("hidden_size", dim, num_heads, f"it is split over num_heads={num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x (N, T, D) to context (N, S, D); returns (N, T, D)."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, T, E)
        kv = self.kv(context).unflatten(-1, (2, self.num_heads, -1))  # (N, S, 2, H, E)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, H, S, E)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, E)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (N, T, D)
        return out


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: D, the width of a token.
        hidden_dim: F, the width between the two layers.
        act: The activation; `None`: the tanh approximation of GELU.
    """

    def __init__(self, dim: int, hidden_dim: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh") if act is None else act
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token on its own: (N, T, D) to (N, T, D)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))  # (N, T, F) -> (N, T, D)
        return out


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): one layer makes value and gate, the other projects back.

    Args:
        dim: D, the width of a token.
        hidden_dim: F, the width of value and gate each.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token on its own: (N, T, D) to (N, T, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)  # (N, T, F) each
        out: Tensor = self.w3(F.silu(gate) * value)  # (N, T, D)
        return out
