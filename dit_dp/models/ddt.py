"""DiT with a wide, shallow head (DDT) for latents of many channels, with the parameter names of `bytetriper/RAE`.

Shapes: N examples, C latent channels, H x W positions, p patch size, G = H/p, T = G*G tokens, D width of the encoder
stream, W width of the decoder stream, E width of a head, Q = 256 frequencies, K classes.

The encoder stream s is a DiT conditioned by time and label. What it says of each token then conditions the decoder
stream x, a few wide blocks that read the same input: adaLN by token, not by example. Blocks are those of
`dit_dp.models.dit` with other norms, MLPs and rotated queries and keys (RAE, arXiv 2510.11690).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.attention import SwiGLU
from dit_dp.models.blocks import named_groups, run_block
from dit_dp.models.dit import DiTBlock, FinalLayer, plain_norm, unpatchify
from dit_dp.models.embedders import (
    INIT_STD,
    MAX_PERIOD,
    LabelEmbedder,
    PatchEmbed,
    check_batch,
    check_dropout,
    init_as_linear_,
    sincos_positions,
)
from dit_dp.models.registry import DDT_SIZES

FREQUENCIES = 256


class GaussianFourierEmbedding(nn.Module):
    """Sines and cosines of the time at 256 random frequencies that stay fixed, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Turn times (N,) into vectors (N, D); angles in float32, so that a float64 copy is the same function."""
        weight = cast(Tensor, self.mlp[0].weight)
        angles = 2 * torch.pi * t.float()[:, None] * self.W.float()  # (N, Q)
        features = torch.cat([angles.sin(), angles.cos()], dim=1)  # (N, 2Q)
        out: Tensor = self.mlp(features.to(weight.dtype))  # (N, D)
        return out


class RotaryPositions(nn.Module):
    """2-D rotary positions: one half of a head turns by the token's row, the other by its column.

    Args:
        head_dim: E, a multiple of 4.
        grid_size: G.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid_size: int) -> None:
        super().__init__()
        half = head_dim // 2
        frequencies = 1.0 / MAX_PERIOD ** (torch.arange(0, half, 2).float() / half)  # (E/4,)
        line = torch.arange(grid_size)[:, None] * frequencies  # (G, E/4)
        line = line.repeat_interleave(2, dim=1)  # (G, E/2), both numbers of a pair
        rows, columns = line.repeat_interleave(grid_size, dim=0), line.repeat(grid_size, 1)  # (T, E/2)
        angles = torch.cat([rows, columns], dim=1)  # (T, E)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Turn queries or keys (N, H, T, E), pair by pair."""
        first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)  # (N, H, T, E/2)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)  # (N, H, T, E)
        return x * self.freqs_cos + turned * self.freqs_sin


class DiTwDDTHead(nn.Module):
    """Encoder stream, then a decoder stream that it conditions token by token.

    Args:
        input_size: H = W.
        patch_size: p, of both streams.
        in_channels: C.
        hidden_size: D, W.
        depth: Blocks of encoder, decoder.
        num_heads: Attention heads of encoder, decoder.
        mlp_ratio: Hidden width of the MLP over the width; SwiGLU's is 2/3 of it.
        class_dropout_prob: Chance that a label is dropped in training.
        num_classes: K, without the null label.
        use_qknorm: Normalise queries and keys.
        use_swiglu: Else GELU.
        use_rope: Rotate queries and keys by 2-D positions.
        use_rmsnorm: RMSNorm with a weight; else LayerNorm without (for queries and keys, with).
        use_pos_embed: Add fixed sine-cosine positions to the encoder's tokens.
        activation_checkpointing: Recompute each block in the backward pass instead of storing it.

    Raises:
        UsageError: A size that is no positive integer, does not divide, or is not given twice.
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        hidden_size: Sequence[int] = (1152, 2048),
        depth: Sequence[int] = (28, 2),
        num_heads: Sequence[int] = (16, 16),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        *,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        use_pos_embed: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "patch_size": patch_size, "in_channels": in_channels}
        _check_sizes(sizes | {"num_classes": num_classes}, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        validate.real("mlp_ratio", mlp_ratio, positive=True)
        check_dropout(class_dropout_prob)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels, self.num_classes = in_channels, num_classes
        self.num_tokens, self.num_encoder_blocks = (input_size // patch_size) ** 2, depth[0]
        self.activation_checkpointing = activation_checkpointing
        (encoder, decoder), norms = hidden_size, _norms(use_rmsnorm)

        self.x_embedder = PatchEmbed(patch_size, in_channels, decoder)
        self.s_embedder = PatchEmbed(patch_size, in_channels, encoder)
        self.s_projector = nn.Identity() if encoder == decoder else nn.Linear(encoder, decoder)
        self.t_embedder = GaussianFourierEmbedding(encoder)
        self.y_embedder = LabelEmbedder(num_classes, encoder, class_dropout_prob)
        self.final_layer = FinalLayer(decoder, patch_size, in_channels, norm=norms[0])
        positions = torch.empty(1, self.num_tokens, encoder)
        self.pos_embed = nn.Parameter(positions, requires_grad=False) if use_pos_embed else None
        grid_size = input_size // patch_size
        self.enc_feat_rope = RotaryPositions(encoder // num_heads[0], grid_size) if use_rope else None
        self.dec_feat_rope = RotaryPositions(decoder // num_heads[1], grid_size) if use_rope else None

        def block(width: int, heads: int) -> nn.Module:
            mlp = SwiGLU(width, int(2 / 3 * int(width * mlp_ratio))) if use_swiglu else None
            qk_norm = norms[1] if use_qknorm else None
            return DiTBlock(width, heads, mlp_ratio, norm=norms[0], mlp=mlp, qk_norm=qk_norm)

        streams = zip(hidden_size, num_heads, depth, strict=True)
        self.blocks = nn.ModuleList(block(width, heads) for width, heads, blocks in streams for _ in range(blocks))
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Self:
        """Build a size of `DDT_SIZES`; `overrides` replace arguments of the class.

        Raises:
            UsageError: Unknown name, or sizes that do not fit.
        """
        validate.one_of("model", name, DDT_SIZES)
        size = DDT_SIZES[name]
        named = {"hidden_size": size.hidden_size, "depth": size.depth, "num_heads": size.num_heads}
        return cls(**{**named, **overrides})

    def initialize_weights(self) -> None:
        """Initialise as RAE does: zeros for modulations and the final linear; other linears as torch makes them."""
        init_as_linear_(self.x_embedder.proj)
        init_as_linear_(self.s_embedder.proj)
        for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
            nn.init.normal_(self.get_parameter(name), std=INIT_STD)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[2], self.input_size // self.patch_size))

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of all parameters but the fixed ones: ``encoder``, ``decoder`` (with its ``head``)."""
        decoder = tuple(f"blocks.{i}." for i in range(self.num_encoder_blocks, len(self.blocks)))
        groups = {"head": ("final_layer.",), "decoder": ("x_embedder.", "s_projector.", *decoder), "encoder": ("",)}
        return named_groups(self, groups, fixed=("pos_embed", "t_embedder.W"))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        """Predict from a noisy latent.

        Args:
            x: Noisy latent, (N, C, H, W).
            t: Times, (N,), any real dtype.
            y: Labels, (N,), integer.
            drop_labels: Which labels to drop, (N,), bool; the model then draws nothing. `None`: drawn once per
                example in training, none in evaluation.

        Returns:
            Prediction, (N, C, H, W).

        Raises:
            UsageError: A tensor of the wrong shape, or a drop without a null label.
        """
        check_batch(x, t, y, self.in_channels, self.input_size)
        time = self.t_embedder(t)  # (N, D)
        c = F.silu(time + self.y_embedder(y, drop_labels))  # (N, D)
        s = self.s_embedder(x)  # (N, T, D)
        s = s if self.pos_embed is None else s + self.pos_embed
        for block in self.blocks[: self.num_encoder_blocks]:
            s = run_block(block, s, c, self.enc_feat_rope, recompute=self.activation_checkpointing)
        s = self.s_projector(F.silu(time.unsqueeze(1) + s))  # (N, T, W)
        # Not rounded by autocast, as blocks add to it.
        tokens = self.x_embedder(x).to(self.x_embedder.proj.weight.dtype)  # (N, T, W)
        for block in self.blocks[self.num_encoder_blocks :]:
            tokens = run_block(block, tokens, s, self.dec_feat_rope, recompute=self.activation_checkpointing)
        return unpatchify(self.final_layer(tokens, s), self.patch_size, self.out_channels)


def _norms(use_rmsnorm: bool) -> tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]:
    """Return what makes the norms of tokens, and of queries and keys."""
    if use_rmsnorm:
        rms = partial(nn.RMSNorm, eps=1e-6)
        return rms, rms
    return plain_norm, nn.LayerNorm


def _check_sizes(
    sizes: dict[str, int], *, hidden_size: Sequence[int], depth: Sequence[int], num_heads: Sequence[int]
) -> None:
    """Raise `UsageError` on the first size that does not fit."""
    for name, pair in (("hidden_size", hidden_size), ("depth", depth), ("num_heads", num_heads)):
        if len(pair) != 2:
            raise UsageError.for_value(name, pair, "two numbers: encoder, decoder")
        sizes = {**sizes, f"{name}[0]": pair[0], f"{name}[1]": pair[1]}
    for name, value in sizes.items():
        validate.integer(name, value)
    size, patch = sizes["input_size"], sizes["patch_size"]
    validate.divisible("input_size", size, patch, f"it is cut into patches of side {patch}")
    for width, heads in zip(hidden_size, num_heads, strict=True):
        validate.divisible("hidden_size", width, 4 * heads, f"each of {heads} heads turns a quarter of its pairs twice")
