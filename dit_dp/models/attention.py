"""Attention and MLP of a transformer block, with the parameter names of timm.

Shapes: N examples, T tokens, D width, H heads, F hidden width of the MLP.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dit_dp import validate


class Attention(nn.Module):
    """Multi-head self-attention through `F.scaled_dot_product_attention`.

    Args:
        dim: D, the width of a token.
        num_heads: H; must divide D.

    Raises:
        UsageError: D is not a multiple of H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        validate.divisible("hidden_size", dim, num_heads, f"it is split over num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token of the same example.

        Args:
            x: Tokens, (N, T, D).

        Returns:
            Mixed tokens, (N, T, D).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, H, T, D/H)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (N, T, D)
        return out


class Mlp(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them.

    Args:
        dim: D, the width of a token.
        hidden_dim: F, the width between the two layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token on its own: (N, T, D) to (N, T, D)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))  # (N, T, F) -> (N, T, D)
        return out
