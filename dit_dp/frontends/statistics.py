"""Statistics that latents are normalised by: of public data, or of private data for a price.

Shapes: n images, C latent channels, h = w latent positions.

A mean and a variance of private images are a release about them, like a gradient. Taken for nothing they would be in
every latent, and in every model trained on those, without a share in epsilon. So `fit_statistics` wants to be told
that the data are public, or at what noise to charge for them.
"""

import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dit_dp import validate
from dit_dp.clipping.noise import entropy_size, generator_of
from dit_dp.data import Images
from dit_dp.errors import UsageError
from dit_dp.files import write_whole
from dit_dp.privacy import Mechanism

VARIANCE_EPS = 1e-5
"""What is added to a variance whose square root is divided by, as the representation autoencoder has it."""

_SMALLEST_VARIANCE = 1e-4
"""Of noisy variances, which may come out negative."""

_BLOCKS = 3
"""Parts of what an image contributes, each of norm at most 1: that it is there, its means, its mean squares."""


@dataclass(frozen=True, kw_only=True)
class PrivateStatistics:
    """Ask for statistics of private data by name.

    Attributes:
        noise_multiplier: sigma of the Gaussian mechanism, > 0; what it costs is `mechanism`.
        max_rms: Bound on what an image contributes: its channel means, as a vector, are scaled down to the norm
            max_rms sqrt(C), and its channel mean squares to max_rms^2 sqrt(C). A number to know without the data.

    Raises:
        UsageError: A value is not a positive number.
    """

    noise_multiplier: float
    max_rms: float = 1.5

    def __post_init__(self) -> None:
        validate.real("noise_multiplier", self.noise_multiplier, positive=True)
        validate.real("max_rms", self.max_rms, positive=True)

    @property
    def mechanism(self) -> Mechanism:
        """What is spent: one Gaussian mechanism on all data, to be composed with the training's."""
        return Mechanism(noise_multiplier=self.noise_multiplier, sample_rate=1.0, num_steps=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentStatistics:
    """Mean and variance of latents.

    Attributes:
        mean: (C,), (C, 1, 1) or (C, h, w), float32.
        var: Of the same shape, >= 0.
        noise_multiplier: Of the mechanism that drew them from private data; `None`: from public data.

    Raises:
        UsageError: Shapes that differ, numbers that are not finite, a negative variance.
    """

    mean: Tensor
    var: Tensor
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.mean.shape != self.var.shape or self.mean.ndim not in (1, 3):
            shapes = (tuple(self.mean.shape), tuple(self.var.shape))
            raise UsageError.for_value("statistics", shapes, "mean and var of one shape, (C,) or (C, h, w)")
        if not torch.isfinite(self.mean).all() or not torch.isfinite(self.var).all() or (self.var < 0).any():
            raise UsageError("statistics: mean or var has numbers that are not finite, or a variance is negative")

    @property
    def mechanism(self) -> Mechanism | None:
        """What was spent on them, to be composed with the training's; `None` if they are of public data."""
        if self.noise_multiplier is None:
            return None
        return PrivateStatistics(noise_multiplier=self.noise_multiplier).mechanism

    def fitting(self, channels: int, size: int) -> "LatentStatistics":
        """Return them as (C, 1, 1) or (C, h, w), or raise `UsageError` if they are of other latents."""
        mean, var = (t.float().reshape(-1, 1, 1) if t.ndim == 1 else t.float() for t in (self.mean, self.var))
        if mean.shape not in ((channels, 1, 1), (channels, size, size)):
            accepted = f"mean and var of ({channels},) or ({channels}, {size}, {size})"
            raise UsageError.for_value("statistics", tuple(self.mean.shape), accepted)
        return LatentStatistics(mean=mean, var=var, noise_multiplier=self.noise_multiplier)


def fit_statistics(
    latents: Images,
    *,
    public: bool = False,
    private: PrivateStatistics | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> LatentStatistics:
    """Return the mean and the variance of each channel over images and positions.

    Private statistics are one Gaussian mechanism. An image contributes (1, m, s): its C channel means, scaled down to
    norm 1 after division by max_rms sqrt(C), and its C channel mean squares, by max_rms^2 sqrt(C). The sum gets noise
    of standard deviation sigma sqrt(3) for each number; counts, means and variances are made of that alone.

    **Guarantees**: adding or removing one image moves the sum by at most sqrt(3) in norm, whatever its latents are,
    so the release costs what `mechanism` says. The number of images is not taken for public. **Edge cases**: latents
    that are not finite contribute their 1 alone; no image gives noise; a variance below 1e-4 is raised to it. The unit
    is an image: where sets are units, these statistics must be public.

    Args:
        latents: Latents that are not normalised yet (`CachedLatents` of a front-end with ``statistics="none"``).
        public: The data are public: nothing is spent.
        private: Or they are private, and what is spent is this.
        batch_size: Images read at a time.
        generator: Of the noise, on the CPU; `None`: one with the operating system's entropy. A seed that others know
            voids the guarantee.

    Returns:
        Mean and variance, (C, 1, 1).

    Raises:
        UsageError: Neither or both of `public` and `private`, or sets instead of images.
    """
    validate.integer("batch_size", batch_size)
    if not isinstance(latents, Images):
        raise UsageError.for_value("latents", type(latents).__name__, "images", "of sets, statistics must be public")
    if public == (private is not None):
        raise UsageError.for_value(
            "private",
            private,
            "PrivateStatistics(noise_multiplier=...), or public=True, and not both",
            "statistics of private data are a release and have to be asked for by name and charged",
        )
    total = torch.zeros(1 + 2 * latents.channels, dtype=torch.float64)
    for first in range(0, len(latents), batch_size):
        numbers = torch.arange(first, min(first + batch_size, len(latents)))
        x = latents.take(numbers)[0].to(torch.float64).flatten(2)  # (N, C, h w)
        total += _contributions(x.mean(2), x.square().mean(2), private).sum(0)
    if private is not None:
        total += _noise(len(total), private.noise_multiplier, generator)
    return _from_total(total, private)


def save_statistics(statistics: LatentStatistics, path: str | Path) -> None:
    """Write statistics to a safetensors file, all of it or nothing.

    Raises:
        UsageError: The file cannot be written.
    """
    file = Path(path)
    tensors = {"mean": statistics.mean.contiguous(), "var": statistics.var.contiguous()}
    metadata = {"noise_multiplier": json.dumps(statistics.noise_multiplier)}
    try:
        write_whole(file, save(tensors, metadata=metadata))
    except OSError as error:
        raise UsageError(f"statistics: cannot write {file}: {error.strerror or error}") from error


def load_statistics(path: str | Path) -> LatentStatistics:
    """Read statistics. Those of a file that does not say what they cost are taken for public.

    Raises:
        UsageError: No such file, or one without `mean` and `var`.
    """
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"statistics: cannot read {file}: {' '.join(cause.split())}") from error
    if set(tensors) != {"mean", "var"}:
        raise UsageError.for_value("statistics", sorted(tensors), f"a file with mean and var, not {file}")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    charged = header.get("__metadata__", {}).get("noise_multiplier", "null")
    return LatentStatistics(mean=tensors["mean"], var=tensors["var"], noise_multiplier=json.loads(charged))


def _contributions(means: Tensor, squares: Tensor, private: PrivateStatistics | None) -> Tensor:
    """Return what images add to the sum, (N, 1 + 2 C): for private data in units of their bounds, each cut to them."""
    ones = torch.ones(len(means), 1, dtype=means.dtype)
    if private is None:
        return torch.cat([ones, means, squares], dim=1)
    mean_bound, square_bound = _bounds(means.shape[1], private)
    return torch.cat([ones, _cut(means / mean_bound), _cut(squares / square_bound)], dim=1)


def _cut(x: Tensor) -> Tensor:
    """Return rows scaled down to norm 1; zero where one is not finite."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(torch.isfinite(norms), x / norms.clamp(min=1.0), torch.zeros_like(x))


def _bounds(channels: int, private: PrivateStatistics) -> tuple[float, float]:
    """Return the norms that an image's means and mean squares are cut to."""
    return private.max_rms * channels**0.5, private.max_rms**2 * channels**0.5


def _noise(count: int, noise_multiplier: float, generator: torch.Generator | None) -> Tensor:
    """Return noise for a sum whose sensitivity is sqrt(3)."""
    if generator is None:
        cpu = torch.device("cpu")
        generator = generator_of(secrets.token_bytes(entropy_size(cpu)), cpu)
    drawn = torch.randn(count, dtype=torch.float64, generator=generator)
    return drawn * (noise_multiplier * math.sqrt(_BLOCKS))


def _from_total(total: Tensor, private: PrivateStatistics | None) -> LatentStatistics:
    """Return the statistics of a sum; only arithmetic on what was released."""
    channels = len(total) // 2
    mean, square = total[1 : 1 + channels], total[1 + channels :]
    if private is not None:
        mean_bound, square_bound = _bounds(channels, private)
        mean, square = mean * mean_bound, square * square_bound
    count = total[0].clamp(min=1.0)
    mean, square = mean / count, square / count
    smallest = 0.0 if private is None else _SMALLEST_VARIANCE
    var = (square - mean.square()).clamp(min=smallest)
    return LatentStatistics(
        mean=mean.float().view(-1, 1, 1),
        var=var.float().view(-1, 1, 1),
        noise_multiplier=None if private is None else private.noise_multiplier,
    )
