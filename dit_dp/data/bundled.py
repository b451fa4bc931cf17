"""Data that needs no download: standard normal inputs, and the digits that scikit-learn ships."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images or latents with labels, as small as they come; a batch is brought to size when it is drawn.

    Attributes:
        x: (M, C', H', W') float32.
        labels: (M,) int64.
        num_classes: Number of labels.
        channels: C, channels of a batch; C' or a multiple of it (grey images repeated).
        size: H = W, side of a batch's images.
    """

    x: Tensor
    labels: Tensor
    num_classes: int
    channels: int
    size: int

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` examples drawn with replacement: (N, C, H, W) and (N,)."""
        index = torch.randint(0, self.x.shape[0], (count,), generator=generator)
        x = self.x[index]
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return x.repeat(1, self.channels // x.shape[1], 1, 1), self.labels[index]


def synthetic(*, size: int, channels: int, num_classes: int, count: int, seed: int = 0) -> ImageSet:
    """Return `count` standard normal inputs (the scale of VAE latents) of (channels, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(
        x=torch.randn(count, channels, size, size, generator=generator),
        labels=torch.randint(0, num_classes, (count,), generator=generator),
        num_classes=num_classes,
        channels=channels,
        size=size,
    )


def digits(*, size: int) -> ImageSet:
    """Return scikit-learn's handwritten digits (1797 of 8 x 8, UCI), resized bilinearly.

    Args:
        size: Side in pixels.

    Returns:
        RGB images of three equal channels in [-1, 1], with 10 classes.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8), 0..16 to -1..1
    labels = torch.from_numpy(bunch.target).long()
    return ImageSet(x=images, labels=labels, num_classes=10, channels=3, size=size)
