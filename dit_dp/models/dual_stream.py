"""A DiT with a second, finer stream: the x2 branch, trained while the backbone stays as it was published.

Shapes: N examples, C input channels, O output channels, H x W positions of the input, p patch size, T tokens of the
backbone, 4T fine tokens of patch size p/2, D width of the backbone, B width of the branch's block.

The branch reads the same noisy input as the backbone. With class tokens, one learned token stands after every four fine
ones, in raster order; the block runs over all 5T, and what it makes of the class tokens is added to the backbone's.
Without, the fine tokens are averaged by four. Backbone names are the reference DiT's; the branch's begin with ``x2_``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.blocks import ViTBlock, named_groups, run_block
from dit_dp.models.dit import DiT, by_token, modulate
from dit_dp.models.embedders import INIT_STD, PatchEmbed, init_as_linear_, init_linears_

FINE = 4
"""Fine tokens to one of the backbone's."""


class DualStreamDiT(DiT):
    """DiT plus x2 branch; a published DiT checkpoint loads into it but for the ``x2_`` names.

    Args:
        x2_width: B, the width of the branch's block, between two projections; `None`: D, without projections.
        x2_num_heads: Attention heads of the branch's block.
        x2_mlp_ratio: Hidden width of its MLP over B.
        x2_norm_eps: Epsilon of its LayerNorms.
        x2_use_cls: Class tokens (T x D parameters); else the fine tokens are averaged.
        x2_fuse_every: Add the branch's tokens after every so many of the backbone's blocks; 0: never. Gradients then
            pass through the backbone, so that its activations are saved even where it is frozen.
        x2_final_fuse: Add them before the final layer.
        x2_condition_with_c: Scale and shift the branch's tokens by the condition (time and label); starts as identity.
        **backbone: Arguments of `DiT`; `activation_checkpointing` is for the branch's block too.

    Raises:
        UsageError: A size that does not fit, an odd patch size, or a branch that is added nowhere.
    """

    x2_cls_tokens: nn.Parameter | None

    def __init__(
        self,
        *,
        x2_width: int | None = 1024,
        x2_num_heads: int = 16,
        x2_mlp_ratio: float = 4.0,
        x2_norm_eps: float = 1e-6,
        x2_use_cls: bool = True,
        x2_fuse_every: int = 0,
        x2_final_fuse: bool = True,
        x2_condition_with_c: bool = False,
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        width, inner = self.hidden_size, self.hidden_size if x2_width is None else x2_width
        validate.divisible("patch_size", self.patch_size, 2, "the x2 branch cuts patches of half its side")
        validate.integer("x2_fuse_every", x2_fuse_every, minimum=0)
        validate.divisible("x2_width", inner, x2_num_heads, f"it is split over x2_num_heads={x2_num_heads}")
        if not x2_final_fuse and not 0 < x2_fuse_every <= len(self.blocks):
            fix = f"or 1 to {len(self.blocks)} for x2_fuse_every, or the branch is used nowhere"
            raise UsageError.for_value("x2_final_fuse", x2_final_fuse, "True", fix)
        self.x2_fuse_every, self.x2_final_fuse = x2_fuse_every, x2_final_fuse
        self.x2_embedder = PatchEmbed(self.patch_size // 2, self.in_channels, width)
        self.x2_proj_in = None if x2_width is None else nn.Linear(width, inner)
        self.x2_vit_block = ViTBlock(inner, x2_num_heads, x2_mlp_ratio, x2_norm_eps)
        self.x2_proj_out = None if x2_width is None else nn.Linear(inner, width)
        self.x2_cls_tokens = nn.Parameter(torch.empty(1, self.num_tokens, width)) if x2_use_cls else None
        self.x2_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if x2_condition_with_c else None
        self.initialize_branch()

    def initialize_branch(self) -> None:
        """Initialise the branch: Xavier-uniform linears, N(0, 0.02) class tokens, zeros for the modulation."""
        init_as_linear_(self.x2_embedder.proj)
        for part in (self.x2_proj_in, self.x2_vit_block, self.x2_proj_out):
            if part is not None:
                init_linears_(part)
        if self.x2_cls_tokens is not None:
            nn.init.normal_(self.x2_cls_tokens, std=INIT_STD)
        if self.x2_modulation is not None:
            for parameter in self.x2_modulation.parameters():
                nn.init.zeros_(parameter)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return names by group: ``x2`` and ``head``, which fine-tuning trains, and ``backbone``, which it freezes."""
        groups = {"x2": ("x2_",), "head": ("final_layer.",), "backbone": ("",)}
        return named_groups(self, groups, fixed=("pos_embed",))

    def denoise(self, x: Tensor, c: Tensor, *more: Any) -> Tensor:
        """Predict from a noisy input (N, C, H, W) under a condition (N, D)."""
        fine = self.fine_tokens(x, c)  # (N, T, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for number, block in enumerate(self.blocks, start=1):
            tokens = run_block(block, tokens, c, *more, recompute=self.activation_checkpointing)
            if self.x2_fuse_every and number % self.x2_fuse_every == 0:
                tokens = tokens + fine
        if self.x2_final_fuse:
            tokens = tokens + fine
        return self.unpatchify(self.final_layer(tokens, c))

    def fine_tokens(self, x: Tensor, c: Tensor) -> Tensor:
        """Return what the branch adds to the backbone's tokens, (N, T, D)."""
        tokens: Tensor = self.x2_embedder(x)
        tokens = tokens.reshape(-1, self.num_tokens, FINE, self.hidden_size)  # (N, T, 4, D)
        if self.x2_cls_tokens is not None:
            learned = self.x2_cls_tokens.unsqueeze(2).expand(len(x), -1, -1, -1)  # (N, T, 1, D)
            tokens = torch.cat([tokens, learned], dim=2)  # (N, T, 5, D)
        group = tokens.shape[2]
        tokens = tokens.flatten(1, 2)  # (N, 4T or 5T, D)
        if self.x2_proj_in is not None:
            tokens = self.x2_proj_in(tokens)  # (N, 4T or 5T, B)
        tokens = run_block(self.x2_vit_block, tokens, recompute=self.activation_checkpointing)
        tokens = tokens.reshape(-1, self.num_tokens, group, tokens.shape[2])  # (N, T, 4 or 5, B)
        tokens = tokens.mean(2) if self.x2_cls_tokens is None else tokens[:, :, FINE]  # (N, T, B)
        if self.x2_proj_out is not None:
            tokens = self.x2_proj_out(tokens)  # (N, T, D)
        if self.x2_modulation is not None:
            tokens = modulate(tokens, *by_token(self.x2_modulation(c)).chunk(2, dim=-1))
        return tokens
