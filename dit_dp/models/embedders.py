"""What turns an input, a time and a label into tokens and conditions, shared by every model.

Shapes: N examples, C input channels, H x W positions of the input, p patch size, G = H/p tokens a side, T = G*G
tokens, D width, F = 256 time frequencies, K classes.

Random numbers are drawn in one place only, `select_labels`, and not even there when told which labels to drop.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError

TIME_FREQUENCIES = 256
MAX_PERIOD = 10_000
INIT_STD = 0.02
"""Of embedding tables, class tokens and the time's MLP."""


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


def check_batch(x: Tensor, t: Tensor, y: Tensor | None, channels: int, size: int) -> None:
    """Raise `UsageError` unless x is (N, channels, size, size) and t and y (if there are labels) are (N,)."""
    if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
        raise UsageError.for_value("x", tuple(x.shape), f"shape (N, {channels}, {size}, {size})")
    for name, value in (("t", t), ("y", y)):
        if value is not None and value.shape != x.shape[:1]:
            raise UsageError.for_value(name, tuple(value.shape), f"shape ({x.shape[0]},), one entry per example")


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


def init_as_linear_(projection: nn.Conv2d) -> None:
    """Initialise a patch projection as the linear layer it is: Xavier-uniform weight, zero bias."""
    assert projection.bias is not None
    nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
    nn.init.zeros_(projection.bias)


def init_linears_(model: nn.Module) -> None:
    """Give every linear layer a Xavier-uniform weight and a zero bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
