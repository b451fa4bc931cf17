"""Distances between two sets of features: FID and KID by torchmetrics, precision and recall here.

Shapes: N generated, M real, F features.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError

if TYPE_CHECKING:
    from torchmetrics import Metric

ROWS_AT_ONCE = 1024
"""Rows of a distance matrix held at a time."""


class _Given(nn.Module):
    """Takes features for images, so that each image is seen by the extractor once for all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Return FID: ``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`` of means and covariances (Heusel et al., arXiv 1706.08500).

    Args:
        generated: (N, F), N > F.
        real: (M, F), M > F.

    Raises:
        UsageError: So few images that a covariance is singular: the distance would depend on their number more than
            on what they show. It is biased upwards even so; compare only at equal N.
    """
    width = _check(generated, real)
    for name, features in (("samples", generated), ("reference", real)):
        if len(features) <= width:
            fix = f"FID needs more images than there are features ({width}); KID does not"
            raise UsageError.for_value(name, f"{len(features)} images", f"at least {width + 1}", fix)
    metric = _metric("fid", "FrechetInceptionDistance", feature=_Given(width))
    return float(_distance(metric, generated, real))


def kernel_distance(
    generated: Tensor, real: Tensor, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Return KID and its standard deviation over subsets (Bińkowski et al., arXiv 1801.01401).

    Args:
        generated: (N, F).
        real: (M, F).
        subset_size: Images in a subset; at most N and M are taken.
        num_subsets: Subsets whose squared MMD, unbiased, with the kernel ``(x y / F + 1)^3``, is averaged.
        seed: Of the subsets.

    Raises:
        UsageError: Fewer than two images on a side.
    """
    width = _check(generated, real)
    size = min(subset_size, len(generated), len(real))
    validate.integer("kid_subset_size", size, minimum=2, fix="there are too few images")
    metric = _metric("kid", "KernelInceptionDistance", feature=_Given(width), subsets=num_subsets, subset_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = _distance(metric, generated, real)
    return float(mean), float(deviation)


def precision_recall(generated: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    A set's manifold is the union of balls around its features, each as large as the distance to its k-th nearest
    neighbour in the set.

    Args:
        generated: (N, F), N > k.
        real: (M, F), M > k.
        neighbours: k.

    Returns:
        The fraction of generated features in the real manifold, and of real ones in the generated.

    Raises:
        UsageError: Too few images for k neighbours.
    """
    _check(generated, real)
    for name, features in (("samples", generated), ("reference", real)):
        if len(features) <= neighbours:
            raise UsageError.for_value(name, f"{len(features)} images", f"at least {neighbours + 1}", "see neighbours")
    return _inside(generated, real, _radii(real, neighbours)), _inside(real, generated, _radii(generated, neighbours))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Return each feature's distance to its k-th nearest neighbour, itself not counted, (N,)."""
    radii = []
    for start in range(0, len(features), ROWS_AT_ONCE):
        distances = torch.cdist(features[start : start + ROWS_AT_ONCE], features)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the fraction of features that are in at least one ball."""
    starts = range(0, len(features), ROWS_AT_ONCE)
    inside = [(torch.cdist(features[start : start + ROWS_AT_ONCE], centres) <= radii).any(1) for start in starts]
    return torch.cat(inside).double().mean().item()


def _check(generated: Tensor, real: Tensor) -> int:
    """Return F, or raise `UsageError`."""
    if generated.dim() != 2 or real.dim() != 2 or generated.shape[1] != real.shape[1]:
        got = f"{tuple(generated.shape)} and {tuple(real.shape)}"
        raise UsageError.for_value("features", got, "two sets of features, (N, F) and (M, F)")
    return int(real.shape[1])


def _distance(metric: "Metric", generated: Tensor, real: Tensor) -> Any:
    """Return what a metric says of two sets of features."""
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute()


def _metric(module: str, name: str, **options: Any) -> "Metric":
    """Return a metric of torchmetrics, or raise `UsageError` if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # KID keeps all features, as is said there
            metrics = importlib.import_module(f"torchmetrics.image.{module}")
            metric: Metric = getattr(metrics, name)(**options)
    except ImportError as error:
        cause = " ".join(str(error).split())
        message = f"metrics: torchmetrics cannot be imported ({cause}); pip install 'dit-dp[evaluate]'"
        raise UsageError(message) from error
    return metric.set_dtype(torch.float64)
