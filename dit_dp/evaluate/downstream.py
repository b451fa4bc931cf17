"""The standard of private synthesis: train a classifier on samples alone, test it on real images.

Shapes: N samples, n test images, C channels, H = W = size, K classes.

Nothing is chosen by the test images: recipe, number of steps and regularisation are fixed, the last weights are the
ones that are tested, and each classifier is tested once.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_dp.errors import UsageError
from dit_dp.evaluate.classifier import Recipe, fit, scaled
from dit_dp.evaluate.pictures import Pictures

TESTED_AT_ONCE = 512
LOGISTIC_SIDE = 32
"""Largest side that logistic regression sees images at."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Fractions of the real test images whose label was found, 0 to 1.

    Attributes:
        cnn: By `SmallClassifier`.
        logistic: By logistic regression on pixels.
        num_samples: N.
        num_test: n.
    """

    cnn: float
    logistic: float
    num_samples: int
    num_test: int


def downstream_accuracy(
    samples: Pictures,
    real_test: Pictures,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Accuracy:
    """Return what classifiers that saw samples alone reach on real test images.

    Args:
        samples: With labels.
        real_test: With labels, of the samples' size and channels.
        recipe: How the CNN is trained.
        seed: Of the CNN.
        device: Where the CNN is trained.

    Raises:
        UsageError: Labels missing, fewer than two classes among the samples, a test label below 0, or another shape.
    """
    labels, truth = samples.labelled("samples"), real_test.labelled("test")
    if samples.pixels.shape[1:] != real_test.pixels.shape[1:]:
        accepted = f"images of the samples' shape {tuple(samples.pixels.shape[1:])}"
        raise UsageError.for_value("test", tuple(real_test.pixels.shape[1:]), accepted)
    known = sorted(set(labels.tolist()))
    if len(known) < 2 or known[0] < 0 or truth.min() < 0:
        accepted = "samples of at least two classes, labels from 0"
        raise UsageError.for_value("samples", known, accepted, "a classifier has nothing to tell apart")
    num_classes = max(known[-1], int(truth.max())) + 1
    model = fit(samples.pixels, labels, num_classes, recipe=recipe, seed=seed, device=device)
    starts, many = range(0, len(real_test), TESTED_AT_ONCE), TESTED_AT_ONCE
    with torch.no_grad():
        logits = [model(scaled(real_test.pixels[start : start + many]).to(device)).cpu() for start in starts]
    found = torch.cat(logits).argmax(1)
    return Accuracy(
        cnn=_fraction(found, truth),
        logistic=_fraction(_logistic(samples.pixels, labels, real_test.pixels), truth),
        num_samples=len(samples),
        num_test=len(real_test),
    )


def _fraction(found: Tensor, truth: Tensor) -> float:
    return (found == truth).double().mean().item()


def _logistic(pixels: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return the labels, (n,), that logistic regression trained on samples gives test images."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # The number of iterations is part of the fixed recipe, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=0.1, max_iter=200).fit(_rows(pixels).numpy(), labels.numpy())
    return torch.from_numpy(model.predict(_rows(test).numpy()))


def _rows(pixels: Tensor) -> Tensor:
    """Return images as rows of numbers in [-1, 1], averaged to `LOGISTIC_SIDE` where they are larger."""
    side = min(LOGISTIC_SIDE, pixels.shape[-1])
    return F.adaptive_avg_pool2d(scaled(pixels), side).flatten(1)
