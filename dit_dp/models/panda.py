"""A small DiT on pixels: many tokens of little width, where Gram-matrix norms are hopeless and direct ones cheap.

Shapes: N examples, C channels, H x W pixels, p patch size, T = (H/p)^2 tokens, D width, P = C*p*p numbers of a patch,
K classes.

Differences from the DiT of Peebles & Xie: learned positions, drawn from U[0, 1); norms with scale and shift of their
own below the modulation; six linear layers for a block's modulation, which do not start at zero; heads that are
each as wide as the token; a ReLU MLP; no variances and no null label.
"""

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.models.attention import Attention, Mlp
from dit_dp.models.blocks import named_groups, run_block
from dit_dp.models.dit import by_token, modulate, unpatchify
from dit_dp.models.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, check_batch


class PandaBlock(nn.Module):
    """Transformer block modulated by six linear layers of the condition.

    Args:
        width: D, also the width of each head.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        scale: Factor on the attention's logits; `None`: D^-0.5.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, scale: float | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, head_dim=width, scale=scale)
        self.mlp = Mlp(width, int(width * mlp_ratio), act=nn.ReLU())
        self.shift_msa, self.scale_msa, self.gate_msa = (nn.Linear(width, width) for _ in range(3))
        self.shift_mlp, self.scale_mlp, self.gate_mlp = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform tokens (N, T, D) under the condition (N, D)."""
        layers = (self.shift_msa, self.scale_msa, self.gate_msa, self.shift_mlp, self.scale_mlp, self.gate_mlp)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = [by_token(layer(c)) for layer in layers]
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # (N, T, D)
        out: Tensor = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return out


class PandaDiT(nn.Module):
    """Small pixel DiT; 773,344 parameters as it stands.

    Args:
        input_size: H = W.
        patch_size: p; must divide `input_size`.
        in_channels: C.
        hidden_size: D.
        depth: Number of blocks.
        num_heads: Attention heads, each D wide.
        mlp_ratio: Hidden width of the MLP over D.
        num_classes: K.
        scale_by_tokens: Multiply the attention's logits by T^-0.5, as the source does, instead of D^-0.5.
        activation_checkpointing: Recompute each block in the backward pass instead of storing it.

    Raises:
        UsageError: A size that is no positive integer or does not divide; names the argument and the fix.
    """

    def __init__(
        self,
        input_size: int = 256,
        patch_size: int = 4,
        in_channels: int = 3,
        hidden_size: int = 64,
        depth: int = 3,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1,
        scale_by_tokens: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "patch_size": patch_size, "in_channels": in_channels, "depth": depth}
        sizes |= {"hidden_size": hidden_size, "num_heads": num_heads, "num_classes": num_classes}
        for name, value in sizes.items():
            validate.integer(name, value)
        validate.real("mlp_ratio", mlp_ratio, positive=True)
        validate.divisible("input_size", input_size, patch_size, f"it is cut into patches of side {patch_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_tokens, self.num_classes = (input_size // patch_size) ** 2, num_classes
        self.out_channels, self.activation_checkpointing = in_channels, activation_checkpointing

        patch_values = in_channels * patch_size**2
        self.x_embedder = PatchEmbed(patch_size, in_channels, patch_values)
        self.patch_proj = nn.Linear(patch_values, hidden_size)
        self.pos_embed = nn.Parameter(torch.rand(1, self.num_tokens, hidden_size))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_mlp = Mlp(hidden_size, hidden_size, act=nn.ReLU())
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, 0.0)
        scale = self.num_tokens**-0.5 if scale_by_tokens else None
        self.blocks = nn.ModuleList(PandaBlock(hidden_size, num_heads, mlp_ratio, scale) for _ in range(depth))
        self.norm_final = nn.LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of all parameters by the part of the model they belong to; none is fixed."""
        return named_groups(self, {"head": ("norm_final.", "linear."), "backbone": ("",)})

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        """Predict the noise of noisy pixels.

        Args:
            x: Noisy pixels, (N, C, H, W).
            t: Steps, (N,), any real dtype.
            y: Labels, (N,), integer.
            drop_labels: `None` or all False, (N,): there is no null label.

        Returns:
            Prediction, (N, C, H, W).

        Raises:
            UsageError: A tensor of the wrong shape, or a label to be dropped.
        """
        check_batch(x, t, y, self.in_channels, self.input_size)
        tokens = self.patch_proj(self.x_embedder(x)) + self.pos_embed  # (N, T, D)
        c = self.t_mlp(self.t_embedder(t)) + self.y_embedder(y, drop_labels)  # (N, D)
        for block in self.blocks:
            tokens = run_block(block, tokens, c, recompute=self.activation_checkpointing)
        patches = self.linear(self.norm_final(tokens))  # (N, T, P)
        return unpatchify(patches, self.patch_size, self.in_channels)
