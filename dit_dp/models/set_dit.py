"""Set diffusion: a DiT denoises each image of a set, told by an encoder what the set's other images look like.

Shapes: b sets, M images a set, R = b*M rows (images; those of a set lie together), C channels, H x W positions,
p patch size, T = (H/p)^2 tokens, D width, L = 2 + T tokens of the encoder: class, time, patches.

The privacy unit is the set: images of a set do see each other, sets never do. Whatever has parameters sees rows first,
R of them, also the encoder: it runs once a row, on the set without that row (leave one out).
Few-shot diffusion models (arXiv 2205.15463) are where encoder and conditioning come from.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.attention import CrossAttention
from dit_dp.models.blocks import ViTBlock, named_groups, run_block
from dit_dp.models.dit import DiT, DiTBlock, plain_norm
from dit_dp.models.embedders import INIT_STD, PatchEmbed, TimestepEmbedder, check_batch, init_as_linear_, init_linears_

EncoderKind = Literal["svit", "vit"]
Conditioning = Literal["film", "lag"]
ENCODERS: tuple[EncoderKind, ...] = ("svit", "vit")
CONDITIONINGS: tuple[Conditioning, ...] = ("film", "lag")


class LagBlock(DiTBlock):
    """DiT block whose tokens then attend to the context's; starts as the DiT block alone."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.norm_cross = plain_norm(width)
        self.cross = CrossAttention(width, num_heads)

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """Transform tokens (R, T, D) under a condition (R, D) and context tokens (R, T, D)."""
        x = super().forward(x, c)
        out: Tensor = x + self.cross(self.norm_cross(x), context)  # (R, T, D)
        return out


class LagDiT(DiT):
    """DiT of `LagBlock`s."""

    def initialize_weights(self) -> None:
        """Initialise as the DiT, with zeros where a block adds what it took from the context."""
        super().initialize_weights()
        for name, parameter in self.named_parameters():
            if ".cross.proj." in name:
                nn.init.zeros_(parameter)

    def make_block(self, width: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        """Return one block."""
        return LagBlock(width, num_heads, mlp_ratio)


class SetEncoder(nn.Module):
    """Transformer over [class | time | patches] of one image, or of several stacked on their channels.

    Args:
        channels: Channels of an input.
        input_size: H = W.
        patch_size: p.
        hidden_size: D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        local: Learn the attention's temperature and let no token attend to itself.
        activation_checkpointing: Recompute each block in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        *,
        input_size: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        local: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = PatchEmbed(patch_size, channels, hidden_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + (input_size // patch_size) ** 2, hidden_size))
        self.blocks = nn.ModuleList(ViTBlock(hidden_size, num_heads, mlp_ratio, local=local) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        init_linears_(self)
        init_as_linear_(self.x_embedder.proj)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Turn inputs (R, channels, H, W) and time tokens (R, D) into tokens (R, L, D)."""
        patches = self.x_embedder(x)  # (R, T, D)
        learned = self.cls_token.expand(len(x), -1, -1)  # (R, 1, D)
        tokens = torch.cat([learned, time.unsqueeze(1), patches], dim=1) + self.pos_embed  # (R, L, D)
        for block in self.blocks:
            tokens = run_block(block, tokens, recompute=self.activation_checkpointing)
        out: Tensor = self.norm(tokens)  # (R, L, D)
        return out


class SetDiT(nn.Module):
    """Encoder of sets and the DiT that it conditions.

    Args:
        input_size: H = W.
        patch_size: p.
        in_channels: C.
        sample_size: M, at least 2.
        hidden_size: D, of encoder and DiT.
        depth: Blocks of the DiT.
        num_heads: Attention heads of both.
        mlp_ratio: Hidden width of the MLP over D, of both.
        encoder: ``svit``: the other images stacked on their channels, attention with learned temperature and masked
            diagonal; ``vit``: each image by itself, tokens averaged over the other images.
        encoder_depth: Blocks of the encoder; `None`: `depth`.
        conditioning: ``film``: the class token is added to the DiT's time embedding, which its adaLN-Zero reads;
            ``lag``: the DiT's tokens attend to the encoder's patch tokens.
        variational: Turn the context into a diagonal Gaussian that is sampled with noise from the batch; `forward`
            then returns its KL divergence from N(0, I) too.
        activation_checkpointing: Recompute each block in the backward pass instead of storing it.

    Attributes:
        context_shape: Of a row's context and of the noise that samples it: (D,) or (T, D).

    Raises:
        UsageError: A size or name that does not fit.
    """

    _others: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        sample_size: int = 6,
        hidden_size: int = 468,
        depth: int = 6,
        num_heads: int = 9,
        mlp_ratio: float = 3.0,
        *,
        encoder: EncoderKind = "svit",
        encoder_depth: int | None = None,
        conditioning: Conditioning = "film",
        variational: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        validate.one_of("encoder", encoder, ENCODERS)
        validate.one_of("conditioning", conditioning, CONDITIONINGS)
        validate.integer("sample_size", sample_size, minimum=2, fix="each image is told what the others look like")
        encoder_depth = depth if encoder_depth is None else encoder_depth
        validate.integer("encoder_depth", encoder_depth)
        self.input_size, self.in_channels, self.out_channels = input_size, in_channels, in_channels
        self.sample_size, self.encoder_kind, self.conditioning = sample_size, encoder, conditioning
        shared: dict[str, Any] = {"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size}
        shared |= {"num_heads": num_heads, "mlp_ratio": mlp_ratio, "activation_checkpointing": activation_checkpointing}
        denoiser = LagDiT if conditioning == "lag" else DiT
        self.dit = denoiser(in_channels=in_channels, depth=depth, num_classes=None, learn_sigma=False, **shared)
        stacked = sample_size - 1 if encoder == "svit" else 1
        self.encoder = SetEncoder(in_channels * stacked, depth=encoder_depth, local=encoder == "svit", **shared)
        self.time_embed = TimestepEmbedder(hidden_size)
        self.posterior = nn.Linear(hidden_size, 2 * hidden_size) if variational else None
        self.context_shape = (hidden_size,) if conditioning == "film" else (self.dit.num_tokens, hidden_size)
        numbers = range(sample_size)
        others = torch.tensor([[other for other in numbers if other != own] for own in numbers])
        self.register_buffer("_others", others, persistent=False)  # (M, M - 1)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return names by group: ``encoder`` (with its time embedding and posterior) and ``dit``."""
        groups = {"dit": ("dit.",), "encoder": ("encoder.", "time_embed.", "posterior.")}
        return named_groups(self, groups, fixed=("dit.pos_embed",))

    def forward(
        self, x: Tensor, t: Tensor, images: Tensor, context_noise: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the noise of every image of every set.

        Args:
            x: Noisy images, (R, C, H, W) or (b, M, C, H, W).
            t: One time a set: (R,), repeated for its rows, or (b,).
            images: Clean images in the shape of x: a row's context is its set without itself. Or, to sample, the
                context of each row: (R, M - 1, C, H, W).
            context_noise: (R, *context_shape), standard normal, if the model is variational.

        Returns:
            Prediction in the shape of x; if the model is variational, also (R,) KL divergences in bits per dimension.

        Raises:
            UsageError: A tensor of the wrong shape, rows that are no whole sets, or noise missing or not wanted.
        """
        rows = x.flatten(0, 1) if x.dim() == 5 else x  # (R, C, H, W)
        t = t.repeat_interleave(self.sample_size) if x.dim() == 5 else t  # (R,)
        self._check(x, rows, t, images)
        condition = self.dit.condition(t)  # (R, D)
        context, kl = self._context(self._tokens(images, t), context_noise)
        if self.conditioning == "film":
            prediction = self.dit.denoise(rows, condition + context)
        else:
            prediction = self.dit.denoise(rows, condition, context)
        prediction = prediction.view(x.shape)
        return prediction if kl is None else (prediction, kl)

    def context(self, images: Tensor, t: Tensor) -> Tensor:
        """Return what the DiT is told of each row's set, (R, *context_shape); the mean, if the model is variational.

        Args:
            images: Clean images, (R, C, H, W) or (b, M, C, H, W).
            t: Times, (R,).
        """
        context = self._part_of(self._tokens(images, t))
        return context if self.posterior is None else self.posterior(context).chunk(2, dim=-1)[0]

    def _tokens(self, images: Tensor, t: Tensor) -> Tensor:
        """Return the encoder's tokens of each row's context, (R, L, D)."""
        time = self.time_embed(t)  # (R, D)
        others = self.sample_size - 1
        if images.dim() == 5 and images.shape[1] == others:
            if self.encoder_kind == "svit":
                return self._encoded(images.flatten(1, 2), time)
            each = self._encoded(images.flatten(0, 1), time.repeat_interleave(others, 0))
            return each.view(-1, others, *each.shape[1:]).mean(1)
        if self.encoder_kind == "svit":
            sets = images.reshape(-1, self.sample_size, *images.shape[-3:])  # (b, M, C, H, W)
            stacked = sets[:, self._others].flatten(0, 1).flatten(1, 2)  # (R, (M - 1) C, H, W)
            return self._encoded(stacked, time)
        each = self._encoded(images.reshape(-1, *images.shape[-3:]), time)  # (R, L, D)
        each = each.view(-1, self.sample_size, *each.shape[1:])  # (b, M, L, D)
        weights = (1 - torch.eye(self.sample_size, dtype=each.dtype, device=each.device)) / others  # (M, M)
        return torch.einsum("ij,bjld->bild", weights, each).flatten(0, 1)  # (R, L, D)

    def _check(self, x: Tensor, rows: Tensor, t: Tensor, images: Tensor) -> None:
        """Raise `UsageError` on the first shape that does not fit."""
        size, own = self.sample_size, (self.in_channels, self.input_size, self.input_size)
        if x.dim() not in (4, 5) or (x.dim() == 5 and x.shape[1] != size):
            raise UsageError.for_value("x", tuple(x.shape), f"shape (b, {size}, C, H, W) or (b * {size}, C, H, W)")
        check_batch(rows, t, None, self.in_channels, self.input_size)
        validate.divisible("x", len(rows), size, f"rows are whole sets of sample_size={size}")
        if tuple(images.shape) not in {tuple(x.shape), tuple(rows.shape), (len(rows), size - 1, *own)}:
            wanted = f"shape {tuple(x.shape)}, or {(len(rows), size - 1, *own)} to sample"
            raise UsageError.for_value("images", tuple(images.shape), wanted)

    def _encoded(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.encoder(x, time)
        return out

    def _part_of(self, tokens: Tensor) -> Tensor:
        """Return what of the encoder's tokens, (R, L, D), is the context, (R, *context_shape)."""
        return tokens[:, 0] if self.conditioning == "film" else tokens[:, 2:]

    def _context(self, tokens: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return contexts, (R, *context_shape), and their KL divergences, (R,), if there is a posterior."""
        context = self._part_of(tokens)
        wanted = None if self.posterior is None else tuple(context.shape)
        got = None if noise is None else tuple(noise.shape)
        if got != wanted:
            raise UsageError.for_value("context_noise", got, "none" if wanted is None else f"shape {wanted}")
        if self.posterior is None or noise is None:
            return context, None
        mean, log_variance = self.posterior(context).chunk(2, dim=-1)  # (R, *context_shape) each
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1) / math.log(2)  # (R,)
        return mean + (0.5 * log_variance).exp() * noise, kl
