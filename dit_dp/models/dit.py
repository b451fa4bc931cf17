"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748), with the reference's parameter names.

Shapes: N examples, C input channels, O output channels (2C when variances are learned), H x W positions of
the input, p patch size, G = H/p tokens a side, T = G*G tokens, D width, F = 256 time frequencies, K classes.

Every layer treats the examples of a batch separately, so a per-example gradient is well defined. The model
draws random numbers in one place only, `select_labels`, and not even there when told which labels to drop.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.attention import Attention, Mlp
from dit_dp.models.blocks import named_groups, run_block
from dit_dp.models.embedders import (
    INIT_STD,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    check_batch,
    check_dropout,
    init_as_linear_,
    init_linears_,
    sincos_positions,
)
from dit_dp.models.registry import MODELS, parse_model_name

CONDITION_INITS = ("reference", "unit")
"""How the label table and the time's MLP start."""


def randomize_zero_init_(
    model: nn.Module, generator: torch.Generator | None = None, std: float = INIT_STD
) -> nn.Module:
    """Replace every parameter that is exactly zero by small normals, in place; frozen ones too.

    A freshly initialised DiT outputs zero and most of its gradients are zero, which tests nothing; one that is frozen
    passes none on to an encoder before it. The values are drawn on the CPU in float32, so they do not depend on the
    model's device or dtype.

    Args:
        model: The model to change.
        generator: Source of randomness, a CPU generator; `None` uses the global one.
        std: Standard deviation.

    Returns:
        The same model.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                values = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
                parameter.copy_(std * values)
    return model


def plain_norm(width: int) -> nn.Module:
    """Return the LayerNorm without parameters that adaLN scales and shifts."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def by_token(modulation: Tensor) -> Tensor:
    """Return an adaLN output for an example, (N, D), or for a token, (N, T, D), so that it broadcasts over tokens."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens (N, T, D) by vectors (N, 1 or T, D)."""
    return x * (1 + scale) + shift  # (N, T, D)


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero).

    Args:
        width: D.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        norm: Makes the two norms, given D.
        mlp: Stands in the MLP's place.
        qk_norm: Makes the norms of queries and keys, given the width of a head; `None`: there are none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        norm: Callable[[int], nn.Module] = plain_norm,
        mlp: nn.Module | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attn = Attention(width, num_heads, qk_norm=qk_norm)
        self.norm2 = norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio)) if mlp is None else mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rope: nn.Module | None = None) -> Tensor:
        """Transform tokens (N, T, D) under a condition an example, (N, D), or a token, (N, T, D)."""
        modulation = by_token(self.adaLN_modulation(c))  # (N, 1 or T, 6D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        mixed = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)  # (N, T, D)
        x = x + gate_msa * mixed
        transformed: Tensor = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x + gate_mlp * transformed


class FinalLayer(nn.Module):
    """Modulated norm and projection of each token to its patch of the output."""

    def __init__(
        self, width: int, patch_size: int, out_channels: int, norm: Callable[[int], nn.Module] = plain_norm
    ) -> None:
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Turn tokens (N, T, D) under a condition (N, D) or (N, T, D) into patches (N, T, p*p*O)."""
        shift, scale = by_token(self.adaLN_modulation(c)).chunk(2, dim=-1)  # (N, 1 or T, D) each
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*O)
        return out


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Lay the patches (N, T, p*p*O) of a square grid out as an output (N, O, H, W)."""
    p, g = patch_size, round(patches.shape[1] ** 0.5)
    cells = patches.reshape(-1, g, g, p, p, channels)  # (N, G, G, p, p, O)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (N, O, H, W)


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
        num_classes: K, without the null label, which is label K; `None`: the model takes no labels.
        learn_sigma: Predict variances too: O = 2C.
        activation_checkpointing: Recompute each block in the backward pass instead of storing it.
        condition_init: ``reference``: label table and time MLP start near zero, N(0, 0.02); ``unit``: the table is
            N(0, 1) and the MLP Xavier-uniform, so that labels and times are told apart from the first step. Few
            noisy steps, as under a privacy budget, do not suffice to grow them from near zero.

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
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        activation_checkpointing: bool = False,
        condition_init: str = "reference",
    ) -> None:
        super().__init__()
        validate.one_of("condition_init", condition_init, CONDITION_INITS)
        _check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            in_channels=in_channels,
            depth=depth,
            **({} if num_classes is None else {"num_classes": num_classes}),
        )
        validate.real("mlp_ratio", mlp_ratio, positive=True)
        check_dropout(class_dropout_prob)
        self.input_size, self.patch_size, self.grid_size = input_size, patch_size, input_size // patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.hidden_size, self.num_classes, self.learn_sigma = hidden_size, num_classes, learn_sigma
        self.num_tokens = self.grid_size**2
        self.activation_checkpointing, self.condition_init = activation_checkpointing, condition_init

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = torch.empty(1, self.num_tokens, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(self.make_block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
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
        and the label table unless `condition_init` says otherwise, zeros for every modulation and for the final
        linear; fixed positions.
        """
        init_linears_(self)
        init_as_linear_(self.x_embedder.proj)
        unit = self.condition_init == "unit"
        for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight") if not unit else ():
            nn.init.normal_(self.get_parameter(name), std=INIT_STD)
        if self.num_classes is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0 if unit else INIT_STD)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.hidden_size, self.grid_size))

    def make_block(self, width: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        """Return one block; called with its tokens, its condition and what else `denoise` was given."""
        return DiTBlock(width, num_heads, mlp_ratio)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of all parameters but the fixed ones, by the part of the model they belong to."""
        return named_groups(self, {"head": ("final_layer.",), "backbone": ("",)}, fixed=("pos_embed",))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop_labels: Tensor | None = None) -> Tensor:
        """Predict the noise (and, with `learn_sigma`, the variances) of a noisy input.

        Args:
            x: Noisy input, (N, C, H, W), of the parameters' dtype.
            t: Times, (N,), any real dtype.
            y: Labels, (N,), integer; none for a model without labels.
            drop_labels: Which labels to drop, (N,), bool; the model then draws nothing. `None`: drawn once
                per example in training, none in evaluation.

        Returns:
            Prediction, (N, O, H, W); the first C channels are the noise.

        Raises:
            UsageError: A tensor of the wrong shape, a drop without a null label, or labels where none are
                taken, or none where they are.
        """
        check_batch(x, t, y, self.in_channels, self.input_size)
        return self.denoise(x, self.condition(t, y, drop_labels))

    def condition(self, t: Tensor, y: Tensor | None = None, drop_labels: Tensor | None = None) -> Tensor:
        """Return the condition, (N, D), of times (N,) and labels (N,)."""
        c: Tensor = self.t_embedder(t)  # (N, D)
        if (y is None) != (self.num_classes is None):
            wanted = "none, the model has no label table" if self.num_classes is None else "a label per example"
            raise UsageError.for_value("y", None if y is None else tuple(y.shape), wanted)
        return c if y is None else c + self.y_embedder(y, drop_labels)

    def denoise(self, x: Tensor, c: Tensor, *more: Any) -> Tensor:
        """Predict from a noisy input (N, C, H, W) under a condition (N, D); blocks are given `more` as well."""
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for block in self.blocks:
            tokens = run_block(block, tokens, c, *more, recompute=self.activation_checkpointing)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Lay the patches (N, T, p*p*O) out as an output (N, O, H, W)."""
        return unpatchify(patches, self.patch_size, self.out_channels)


def _check_sizes(*, input_size: int, patch_size: int, hidden_size: int, num_heads: int, **others: int) -> None:
    """Raise `UsageError` on the first size that is not a positive integer or does not divide."""
    sizes = {"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size}
    for name, value in {**sizes, "num_heads": num_heads, **others}.items():
        validate.integer(name, value)
    validate.divisible("input_size", input_size, patch_size, f"it is cut into patches of side {patch_size}")
    validate.divisible("hidden_size", hidden_size, num_heads, f"it is split over num_heads={num_heads}")
    validate.divisible("hidden_size", hidden_size, 4, "a quarter each for sine and cosine of row and column")
