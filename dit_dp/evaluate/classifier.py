"""A small CNN: the classifier that is trained on samples, and, with its head off, a feature extractor of known weights.

Shapes: N images, C channels, H x W pixels, w width, F = 4w features, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp import validate

GRID = 4
"""Side that feature maps are averaged to, so that any image size fits."""


class SmallClassifier(nn.Module):
    """Three convolutions and a hidden layer.

    Args:
        channels: C.
        num_classes: K.
        width: w.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.channels, self.num_classes, self.width = channels, num_classes, width
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * GRID**2, 4 * width)
        self.head = nn.Linear(4 * width, num_classes)

    @property
    def num_features(self) -> int:
        """F."""
        return 4 * self.width

    def features(self, x: Tensor) -> Tensor:
        """Return features (N, F) of images (N, C, H, W) in [-1, 1]."""
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = F.adaptive_avg_pool2d(self.conv3(x).relu(), GRID)
        hidden: Tensor = self.hidden(x.flatten(1))
        return hidden.relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the classifier is trained: fixed, so that nothing is chosen by what comes of it.

    Attributes:
        num_steps: Optimizer steps, of Adam with a learning rate that falls to 0 along a cosine.
        batch_size: Images a step.
        learning_rate: At the start.
        width: Of `SmallClassifier`.
    """

    num_steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 2e-3
    width: int = 32

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("num_steps", "batch_size", "width"):
            validate.integer(name, getattr(self, name))
        validate.real("learning_rate", self.learning_rate, positive=True)


def fit(
    pixels: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> SmallClassifier:
    """Return a classifier trained on images, in evaluation mode.

    The same arguments give the same weights on the same machine: nothing is drawn from, or left in, torch's own
    generators.

    Args:
        pixels: (N, C, H, W) uint8, N at least 1.
        labels: (N,) int64, in [0, K).
        num_classes: K.
        recipe: How.
        seed: Of initial weights and of the order of images.
        device: Where.
    """
    recipe = recipe or Recipe()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(pixels.shape[1], num_classes, recipe.width)
    model = model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.num_steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.num_steps):
        while len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(pixels), generator=generator)])
        index, order = order[: recipe.batch_size], order[recipe.batch_size :]
        loss = F.cross_entropy(model(scaled(pixels[index]).to(device)), labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def scaled(pixels: Tensor) -> Tensor:
    """Return 8-bit pixels in [-1, 1], float32."""
    return pixels.float() / 127.5 - 1
