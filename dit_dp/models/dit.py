"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748), with the reference's parameter names.

Shapes: N examples, C input channels, O output channels (2C when variances are learned), H x W positions of
the input, p patch size, G = H/p tokens a side, T = G*G tokens, D width, F = 256 time frequencies, K classes.

Every layer treats the examples of a batch separately, so a per-example gradient is well defined. The model
draws random numbers in one place only, `select_labels`, and not even there when told which labels to drop.
"""

import math
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.attention import Attention, Mlp
from dit_dp.models.registry import MODELS, parse_model_name

TIME_FREQUENCIES = 256
MAX_PERIOD = 10_000
INIT_STD = 0.02


def sincos_positions(width: int, grid_size: int) -> Tensor:
    """Return the fixed 2-D sine-cosine position table.

    The first half of the width encodes the column, the second half the row; each half is sines, then cosines.

    Args:
        width: D, a multiple of 4.
        grid_size: G, tokens a side.

    Returns:
        The table, (1, T, D), float32 (computed in float64).
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # (D/4,)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (G, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, D/2)
    columns, rows = line.repeat(grid_size, 1), line.repeat_interleave(grid_size, dim=0)  # (T, D/2)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)  # (1, T, D)


def time_sinusoid(t: Tensor) -> Tensor:
    """Return cosines then sines of the times at 256/2 geometric frequencies.

    Args:
        t: Times, (N,), any real dtype.

    Returns:
        Features, (N, F), float32 whatever the model's dtype, so that a float64 copy is the same function.
    """
    half = TIME_FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)  # (N, F/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, F)


def check_dropout(class_dropout_prob: float) -> None:
    """Raise `UsageError` unless it is a probability."""
    validate.real("class_dropout_prob", class_dropout_prob, positive=False)
    if class_dropout_prob > 1:
        raise UsageError.for_value("class_dropout_prob", class_dropout_prob, "a probability, 0 to 1")


def check_batch(x: Tensor, t: Tensor, y: Tensor, channels: int, size: int) -> None:
    """Raise `UsageError` unless x is (N, channels, size, size) and t and y are (N,)."""
    if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
        raise UsageError.for_value("x", tuple(x.shape), f"shape (N, {channels}, {size}, {size})")
    for name, value in (("t", t), ("y", y)):
        if value.shape != x.shape[:1]:
            raise UsageError.for_value(
                name, tuple(value.shape), f"shape ({x.shape[0]},), one entry per example"
            )


def select_labels(
    y: Tensor, drop_labels: Tensor | None, *, probability: float, training: bool, null_label: int | None
) -> Tensor:
    """Replace the labels of dropped examples by the null label, deciding once per example.

    Args:
        y: Labels, (N,), integer.
        drop_labels: Which labels to drop, (N,), bool; nothing is drawn then. `None`: each is dropped with
            `probability` while training and none otherwise.
        probability: Chance that a label is dropped.
        training: Whether the model is in training mode.
        null_label: The label that means "no label", or `None` if the table has no row for it. Without one,
            a given mask is read on the host (which waits for the device); pass `None` to avoid that.

    Returns:
        Labels, (N,), of y's dtype.

    Raises:
        UsageError: `drop_labels` is not a bool (N,), or asks for a drop where there is no null label.
    """
    if drop_labels is None:
        if not training or probability == 0:
            return y
        drop_labels = torch.rand(y.shape, device=y.device) < probability  # (N,)
    elif drop_labels.dtype != torch.bool or drop_labels.shape != y.shape:
        got = f"{drop_labels.dtype} {tuple(drop_labels.shape)}"
        raise UsageError.for_value("drop_labels", got, f"torch.bool {tuple(y.shape)}")
    if null_label is None:
        if bool(drop_labels.any()):
            raise UsageError.for_value(
                "drop_labels", "a mask with True", "None or all False", "build with class_dropout_prob > 0"
            )
        return y
    return torch.where(drop_labels, null_label, y)


def randomize_zero_init_(
    model: nn.Module, generator: torch.Generator | None = None, std: float = INIT_STD
) -> nn.Module:
    """Replace every trainable parameter that is exactly zero by small normals, in place.

    A freshly initialised DiT outputs zero and most of its gradients are zero, which tests nothing. The values
    are drawn on the CPU in float32, so they do not depend on the model's device or dtype.

    Args:
        model: The model to change.
        generator: Source of randomness, a CPU generator; `None` uses the global one.
        std: Standard deviation.

    Returns:
        The same model.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                values = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
                parameter.copy_(std * values)
    return model


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift the tokens (N, T, D) of each example by its own (N, D) vectors."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # (N, T, D)


class PatchEmbed(nn.Module):
    """Cut the input into p x p patches and project each to a token."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, C, H, W) into (N, T, D), row by row."""
        tokens: Tensor = self.proj(x)  # (N, D, G, G)
        return tokens.flatten(2).transpose(1, 2)  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """Sinusoid of the time, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Turn times (N,) into vectors (N, D)."""
        weight = cast(Tensor, self.mlp[0].weight)
        out: Tensor = self.mlp(time_sinusoid(t).to(weight.dtype))  # (N, D)
        return out


class LabelEmbedder(nn.Module):
    """Label table, with one more row for "no label" when labels may be dropped in training."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.null_label = num_classes if dropout_prob > 0 else None
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)

    def forward(self, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        """Turn labels (N,) into vectors (N, D); see `select_labels` for what is dropped."""
        labels = select_labels(
            y,
            drop_labels,
            probability=self.dropout_prob,
            training=self.training,
            null_label=self.null_label,
        )
        # As N sequences of one label: ExpandedWeights takes an (N,) input for one without a batch.
        out: Tensor = self.embedding_table(labels.unsqueeze(1)).squeeze(1)  # (N, D)
        return out


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform tokens (N, T, D) under the condition (N, D)."""
        modulation: Tensor = self.adaLN_modulation(c)  # (N, 6D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # (N, D)
        mixed = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # (N, T, D)
        x = x + gate_msa.unsqueeze(1) * mixed
        transformed: Tensor = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x + gate_mlp.unsqueeze(1) * transformed


class FinalLayer(nn.Module):
    """Modulated norm and projection of each token to its patch of the output."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Turn tokens (N, T, D) under the condition (N, D) into patches (N, T, p*p*O)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # (N, D) each
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*O)
        return out


class DiT(nn.Module):
    """Diffusion transformer; a published checkpoint of the reference loads unchanged.

    Args:
        input_size: H = W, side of the input in positions (latent or pixel).
        patch_size: p; must divide `input_size`.
        in_channels: C.
        hidden_size: D; a multiple of `num_heads` and of 4 (the position table).
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        class_dropout_prob: Chance that a label is dropped in training. With 0 the label table has no row
            for the null label, as in the reference.
        num_classes: K, without the null label, which is label K.
        learn_sigma: Predict variances too: O = 2C.
        activation_checkpointing: Recompute each block in the backward pass instead of storing it.

    Raises:
        UsageError: A size that is no positive integer or does not divide; names the argument and the fix.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            in_channels=in_channels,
            depth=depth,
            num_classes=num_classes,
        )
        validate.real("mlp_ratio", mlp_ratio, positive=True)
        check_dropout(class_dropout_prob)
        self.input_size, self.patch_size, self.grid_size = input_size, patch_size, input_size // patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.hidden_size, self.num_classes, self.learn_sigma = hidden_size, num_classes, learn_sigma
        self.num_tokens = self.grid_size**2
        self.activation_checkpointing = activation_checkpointing

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = torch.empty(1, self.num_tokens, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Self:
        """Build a member of the family by name.

        Args:
            name: ``DiT-XL/2``, ``DiT-S`` (patch size 2) or a hub name; see `parse_model_name`.
            **overrides: Arguments of the class that replace the named ones.

        Returns:
            A freshly initialised model.

        Raises:
            UsageError: Unknown name, or sizes that do not fit.
        """
        size_name, patch_size = parse_model_name(name)
        size = MODELS[size_name]
        arguments: dict[str, Any] = {
            "depth": size.depth,
            "hidden_size": size.hidden_size,
            "num_heads": size.num_heads,
        }
        if patch_size is not None:
            arguments["patch_size"] = patch_size
        return cls(**{**arguments, **overrides})

    def initialize_weights(self) -> None:
        """Initialise as the reference does: the model starts as the zero function of its input.

        Xavier-uniform linears (the patch projection counts as one), zero biases, N(0, 0.02) for the time MLP
        and the label table, zeros for every modulation and for the final linear; fixed positions.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(self.hidden_size, -1))
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
        for name in (
            "t_embedder.mlp.0.weight",
            "t_embedder.mlp.2.weight",
            "y_embedder.embedding_table.weight",
        ):
            nn.init.normal_(self.get_parameter(name), std=INIT_STD)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.hidden_size, self.grid_size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        """Predict the noise (and, with `learn_sigma`, the variances) of a noisy input.

        Args:
            x: Noisy input, (N, C, H, W), of the parameters' dtype.
            t: Times, (N,), any real dtype.
            y: Labels, (N,), integer.
            drop_labels: Which labels to drop, (N,), bool; the model then draws nothing. `None`: drawn once
                per example in training, none in evaluation.

        Returns:
            Prediction, (N, O, H, W); the first C channels are the noise.

        Raises:
            UsageError: A tensor of the wrong shape, or a drop without a null label.
        """
        check_batch(x, t, y, self.in_channels, self.input_size)
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y, drop_labels)  # (N, D)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # A block draws nothing, so there is no generator state to save and restore.
                tokens = checkpoint(block, tokens, c, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Lay the patches (N, T, p*p*O) out as an output (N, O, H, W)."""
        p, g = self.patch_size, self.grid_size
        cells = patches.reshape(-1, g, g, p, p, self.out_channels)  # (N, G, G, p, p, O)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (N, O, H, W)


def _check_sizes(
    *, input_size: int, patch_size: int, hidden_size: int, num_heads: int, **others: int
) -> None:
    """Raise `UsageError` on the first size that is not a positive integer or does not divide."""
    sizes = {"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size}
    for name, value in {**sizes, "num_heads": num_heads, **others}.items():
        validate.integer(name, value)
    validate.divisible("input_size", input_size, patch_size, f"it is cut into patches of side {patch_size}")
    validate.divisible("hidden_size", hidden_size, num_heads, f"it is split over num_heads={num_heads}")
    validate.divisible("hidden_size", hidden_size, 4, "a quarter each for sine and cosine of row and column")
