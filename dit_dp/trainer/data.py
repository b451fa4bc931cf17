"""What a run trains on, and what it keeps apart."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_dp.data import Examples, Images, digits, image_folder, mnist, sets_of, split, synthetic
from dit_dp.data.sets import Remainder
from dit_dp.errors import UsageError
from dit_dp.trainer.config import BUNDLED, TrainConfig
from dit_dp.workloads import WorkloadSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Data of a run.

    Attributes:
        train: Privacy units, numbered.
        held_out: Examples kept apart from training, or `None`.
        digest: SHA-256 of the training images; tells one data set from another.
        decode: From latents to images, if the data are latents.
    """

    train: Examples
    held_out: Examples | None
    digest: str
    decode: Callable[[Tensor], Tensor] | None = None


def open_data(config: TrainConfig, spec: WorkloadSpec, cache: Path, device: torch.device) -> RunData:
    """Return the data of a run.

    Of a dry run, units are numbered as they would be, but nothing is written and pixels stand for latents.

    Args:
        config: What was asked for.
        spec: Which inputs the model takes.
        cache: Folder for what is made of the data once: latents, and the partition into sets.
        device: Where a front-end encodes.

    Raises:
        UsageError: Data that is not there, not readable, or not what the model takes.
    """
    images, decode = _images(config, spec, cache, device)
    if spec.num_classes is not None and images.num_classes > spec.num_classes:
        fix = f"the data has {images.num_classes} classes"
        raise UsageError.for_value("num_classes", spec.num_classes, f">= {images.num_classes}", fix)
    train, apart = _apart(images, config.held_out) if config.held_out else (images, None)
    size = spec.objective.set_size
    if size is None:
        return RunData(train=train, held_out=apart, digest=train.digest, decode=decode)
    return RunData(
        train=_sets(train, cache, size, config.set_remainder, write=not config.dry_run),
        held_out=None if apart is None else _sets(apart, cache, size, "drop", write=not config.dry_run),
        digest=train.digest,
    )


def _apart(images: Images, fraction: float) -> tuple[Images, Images]:
    """Return the images to train on and those kept apart."""
    try:
        return split(images, fraction)
    except UsageError as error:
        raise UsageError(f"held_out: {str(error).partition(': ')[2]}") from error


def _sets(images: Images, cache: Path, size: int, remainder: Remainder, *, write: bool) -> Examples:
    """Return the sets of images, as they were partitioned first."""
    try:
        if write:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir: cannot make {cache}: {error.strerror or error}") from error
    file = cache / f"sets-{images.digest[:12]}-{size}.json"
    return sets_of(images, file, set_size=size, remainder=remainder, write=write)


def _images(
    config: TrainConfig, spec: WorkloadSpec, cache: Path, device: torch.device
) -> tuple[Images, Callable[[Tensor], Tensor] | None]:
    """Return the images as the model takes them, pixels or latents, and what decodes latents."""
    side, channels = spec.latent_size, spec.in_channels
    if config.data == "synthetic":
        classes = spec.num_classes or 1
        return synthetic(size=side, channels=channels, num_classes=classes, count=config.num_synthetic), None
    if not spec.in_latents:
        return _pixels(config, side, channels), None
    name = spec.workload.frontend
    if config.frontend is None or name is None:
        fix = "a front-end makes latents of them; or take pixels: in_channels=3"
        raise UsageError.for_value("frontend", None, f"a local folder or hub name of a {name}", fix)
    from dit_dp.frontends import encode_data, make_frontend

    frontend = make_frontend(name, config.frontend, statistics=config.frontend_statistics, device=str(device))
    if frontend.spent:
        fix = "a run's ledger charges steps alone; take statistics of public data"
        raise UsageError.for_value("frontend_statistics", config.frontend_statistics, "public statistics", fix)
    if (frontend.latent_channels, frontend.latent_size(spec.image_size)) != (channels, side):
        got = f"{frontend.latent_channels} x {frontend.latent_size(spec.image_size)} positions"
        accepted = f"latents of {channels} x {side}, which the model takes"
        raise UsageError.for_value("frontend", f"{config.frontend}: {got}", accepted)
    pixels = _pixels(config, spec.image_size, frontend.image_channels)
    if config.dry_run:
        return pixels, None
    folder = config.latent_cache or cache / f"latents-{pixels.digest[:12]}-{frontend.weights[:12]}-{spec.image_size}"
    return encode_data(pixels, frontend, folder), frontend.decode


def _pixels(config: TrainConfig, size: int, channels: int) -> Images:
    """Return images in [-1, 1]."""
    if config.data == "digits":
        if channels != 3:
            raise UsageError.for_value("in_channels", channels, "3", "digits are three equal channels")
        return digits(size=size)
    if config.data == "mnist":
        return mnist(size=size, channels=channels)
    folder = Path(config.data or "")
    if not folder.is_dir():
        raise UsageError.for_value("data", config.data, [*BUNDLED, "a folder of images"])
    return image_folder(folder, size=size, channels=channels, classes=config.classes, skip_corrupt=config.skip_corrupt)
