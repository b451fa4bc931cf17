"""What data are to those who train on them: numbered examples, drawn by index.

Shapes: M images, N drawn ones, C channels, H = W = size.

Whatever decides on which side of a split an image is, or in which set, looks at that image alone, by a hash of its
content: so adding or removing another image does not move it, and copies of an image are on the same side.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_dp.errors import UsageError

log = logging.getLogger(__name__)


class Examples(ABC):
    """Numbered examples: images with labels, or sets without.

    Attributes:
        num_classes: Number of labels, those included that no example has.
        channels: C, of what is drawn.
        size: H = W, of what is drawn.
    """

    num_classes: int
    channels: int
    size: int

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples: of privacy units."""

    @abstractmethod
    def take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return examples by number, as `Objective.draw` takes them.

        Args:
            index: (N,) int64; empty for an empty batch.

        Returns:
            Images (N, C, H, W) float32 and labels (N,) int64; or sets (N, images of a set, C, H, W) and `None`.
        """


class Images(Examples):
    """Images with labels.

    Attributes:
        labels: (M,) int64.
    """

    labels: Tensor

    @abstractmethod
    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (N, C, H, W) float32 and labels (N,) int64 by number, (N,)."""

    @abstractmethod
    def subset(self, index: Sequence[int]) -> Self:
        """Return some of the images, in this order; their labels stay as they are."""

    @abstractmethod
    def digests(self) -> list[str]:
        """Return the SHA-256 of each image's content, whatever size it is drawn at, without its label and name."""

    def __len__(self) -> int:
        """Return M."""
        return len(self.labels)

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` examples drawn with replacement: (N, C, H, W) and (N,)."""
        return self.take(torch.randint(0, len(self), (count,), generator=generator))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all images and labels, in order: tells one data set from another."""
        lines = (f"{digest} {label}\n" for digest, label in zip(self.digests(), self.labels.tolist(), strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImageSet(Images):
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

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (N, C, H, W) and labels (N,) by number, (N,)."""
        x = self.x[index]
        if x.shape[-1] != self.size and len(x):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        elif x.shape[-1] != self.size:
            x = x.new_empty(0, x.shape[1], self.size, self.size)
        return x.repeat(1, self.channels // x.shape[1], 1, 1), self.labels[index]

    def subset(self, index: Sequence[int]) -> Self:
        """Return some of the images, in this order."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return replace(self, x=self.x[chosen], labels=self.labels[chosen])

    def digests(self) -> list[str]:
        """Return the SHA-256 of each image's numbers."""
        return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in self.x.cpu()]


AnyImages = TypeVar("AnyImages", bound=Images)


def split(images: AnyImages, test_fraction: float = 0.1) -> tuple[AnyImages, AnyImages]:
    """Return the training and the test images.

    An image is for testing if its digest, read as a number in [0, 1), is below the fraction: whoever splits the same
    images gets the same sides, in any order and beside any other images.

    Raises:
        UsageError: The fraction is not between 0 and 1, or a side is empty.
    """
    if not 0 < test_fraction < 1:
        raise UsageError.for_value("test_fraction", test_fraction, "a number > 0 and < 1")
    is_test = [int(digest, 16) < test_fraction * 16 ** len(digest) for digest in images.digests()]
    train = images.subset([number for number, test in enumerate(is_test) if not test])
    test = images.subset([number for number, test in enumerate(is_test) if test])
    if not len(train) or not len(test):
        side = "train" if not len(train) else "test"
        raise UsageError.for_value("test_fraction", test_fraction, "one that leaves images on both sides", f"no {side}")
    log.info("split: %d images to train on, %d to test on", len(train), len(test))
    return train, test
