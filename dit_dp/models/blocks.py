"""What the models have in common around their blocks: the plain transformer block, recomputation, groups of parameters.

Shapes: N examples, T tokens, D width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_dp.models.attention import Attention, Mlp


class ViTBlock(nn.Module):
    """Transformer block of a ViT: norm, attention, norm, MLP, each with a residual; a block of timm's loads into it.

    Args:
        width: D.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        norm_eps: Epsilon of the two LayerNorms, which have a scale and a shift.
        local: Learn the attention's temperature and let no token attend to itself; see `Attention`.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6, local: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, local=local)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), act=nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (N, T, D)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))  # (N, T, D)
        return out


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """Call a block; with `recompute`, keep its inputs alone and run it once more in the backward pass.

    A block draws nothing, so there is no generator state to save and restore.
    """
    if recompute and torch.is_grad_enabled():
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        out = block(*inputs)
    return out


def named_groups(
    model: nn.Module, prefixes: Mapping[str, tuple[str, ...]], *, fixed: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Sort a model's parameters into groups.

    Args:
        model: Its parameters are taken whether they train now or not.
        prefixes: What names of a group begin with; the first group that fits takes the parameter.
        fixed: Parameters that never train and are in no group.

    Returns:
        Full names by group, in the model's order; groups without a parameter are left out.
    """
    groups: dict[str, list[str]] = {name: [] for name in prefixes}
    for name, _ in model.named_parameters():
        if name not in fixed:
            owner = next(group for group, starts in prefixes.items() if name.startswith(starts))
            groups[owner].append(name)
    return {group: names for group, names in groups.items() if names}
