"""Samples as pictures and as files.

Shapes: N samples, C channels (1 grey, 3 RGB), H x W pixels.

Samples are given as they are drawn, (N, C, H, W) in [-1, 1], or as `to_uint8` makes them, (N, H, W, C).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.files import replacing


def to_uint8(samples: Tensor) -> Tensor:
    """Return images (N, H, W, C) of 0 ... 255, uint8, on the CPU, of images (N, C, H, W) in [-1, 1].

    The inverse of ``pixels / 127.5 - 1``; what lies outside is cut off, NaN becomes 0. What it returned before it
    returns as it is.

    Raises:
        UsageError: Not 1 or 3 channels: latents, which a front-end has to decode first.
    """
    if samples.dtype == torch.uint8 and samples.dim() == 4 and samples.shape[-1] in (1, 3):
        return samples.cpu()
    if samples.dim() != 4 or samples.shape[1] not in (1, 3):
        accepted = "images, shape (N, 1 or 3, H, W)"
        raise UsageError.for_value("samples", tuple(samples.shape), accepted, "decode latents with their front-end")
    pixels = (127.5 * samples.detach().float() + 128).nan_to_num(0, 255, 0).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()


def grid(samples: Tensor, *, columns: int | None = None, padding: int = 2) -> Image.Image:
    """Return one picture of all samples, row by row.

    Args:
        samples: As drawn, or as pixels.
        columns: Samples a row; `None`: as many as make it nearest to a square.
        padding: Black pixels around each sample.

    Raises:
        UsageError: No sample, or not images.
    """
    if not len(samples):
        raise UsageError.for_value("samples", tuple(samples.shape), "at least one sample")
    pixels = to_uint8(samples)
    count, height, width, channels = pixels.shape
    columns = columns if columns is not None else math.ceil(math.sqrt(count))
    validate.integer("columns", columns)
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.zeros(rows * (height + padding) + padding, columns * (width + padding) + padding, channels)
    canvas = canvas.to(torch.uint8)
    for number, image in enumerate(pixels):
        top = padding + number // columns * (height + padding)
        left = padding + number % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.squeeze(-1).numpy())


def save_grid(samples: Tensor, path: Path | str, *, columns: int | None = None, padding: int = 2) -> Path:
    """Write `grid` as a PNG and return its path.

    Raises:
        UsageError: No sample, not images, or the file cannot be written.
    """
    picture = grid(samples, columns=columns, padding=padding)
    return _write(Path(path), lambda file: picture.save(file, format="PNG"))


def save_npz(samples: Tensor, path: Path | str, labels: Tensor | None = None) -> Path:
    """Write samples as ADM's evaluation reads them and return the path: ``arr_0`` uint8 NHWC, ``arr_1`` labels.

    Args:
        samples: As drawn, or as pixels.
        path: The file, which is replaced only when all is written.
        labels: (N,), if there are any.

    Raises:
        UsageError: Not images, labels of another number, or the file cannot be written.
    """
    if labels is not None and labels.shape != samples.shape[:1]:
        raise UsageError.for_value("labels", tuple(labels.shape), f"shape ({len(samples)},), one for each sample")
    arrays = [to_uint8(samples).numpy()]
    arrays += [] if labels is None else [labels.cpu().numpy().astype(np.int64)]
    return _write(Path(path), lambda file: np.savez(file, *arrays))


def save_images(samples: Tensor, folder: Path | str, labels: Tensor | None = None) -> Path:
    """Write each sample as ``folder/LABEL/NUMBER.png``, an image folder, and return it; without labels, label 0.

    Labels are as wide as the largest one's digits, so that their order among folders is theirs among numbers.

    Raises:
        UsageError: Not images, or a file cannot be written.
    """
    pixels = to_uint8(samples)
    names = [0] * len(pixels) if labels is None else labels.tolist()
    width = len(str(max(names, default=0)))
    for number, (image, name) in enumerate(zip(pixels, names, strict=True)):
        picture = Image.fromarray(image.squeeze(-1).numpy())
        path = Path(folder) / f"{name:0{width}d}" / f"{number:06d}.png"
        _write(path, lambda file, picture=picture: picture.save(file, format="PNG"))  # type: ignore[misc]
    return Path(folder)


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file so that a reader sees all of it or nothing, or raise `UsageError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as file:
            write(file)
    except OSError as error:
        raise UsageError(f"output: cannot write {path}: {error.strerror or error}") from error
    return path
