"""Images that are compared: from an npz, a folder or the bundled data, as 8-bit pixels whatever they come from.

Shapes: N images, C channels (1 or 3), H = W = size.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dit_dp.data import ImageFolder, Images, digits, image_folder, mnist, split
from dit_dp.data.folder import SUFFIXES
from dit_dp.errors import UsageError
from dit_dp.sampling import to_uint8

_BUNDLED = {"mnist": (28, 1), "digits": (8, 3)}
"""Own side and channels."""
_SIDES = ("train", "test")
_READ_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images with labels, if there are any.

    Attributes:
        source: Where they are from.
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    source: str
    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        """Return N."""
        return len(self.pixels)

    @property
    def channels(self) -> int:
        """C."""
        return int(self.pixels.shape[1])

    @property
    def size(self) -> int:
        """H = W."""
        return int(self.pixels.shape[-1])

    def labelled(self, name: str) -> Tensor:
        """Return the labels, or raise `UsageError` naming the argument the images came by."""
        if self.labels is None:
            fix = "an npz has them in arr_1, an image folder as one folder for each class"
            raise UsageError.for_value(name, self.source, "images with labels", fix)
        return self.labels


def load_pictures(
    name: str, source: str, *, size: int | None = None, channels: int | None = None, test_fraction: float = 0.2
) -> Pictures:
    """Return the images of a source.

    Args:
        name: Argument it came by, for messages.
        source: ``mnist``, ``digits``, an image folder (with a folder for each class, or flat and without labels), each
            also with ``:train`` or ``:test``; or an ``.npz``.
        size: Side to bring them to; `None`: their own, of a folder its first image's. An npz has to have it already.
        channels: 1 or 3; `None`: their own, of a folder 3.
        test_fraction: Of the split by each image's hash.

    Raises:
        UsageError: Nothing there, no images, or of another shape.
    """
    where, side = _side_of(source)
    if Path(where).suffix == ".npz":
        if side is not None:
            raise UsageError.for_value(name, source, "an npz as a whole", "only data with names or files can be split")
        return _of_channels(_load_npz(name, where, size), channels)
    images = _images(name, where, size, channels)
    if side is not None:
        images = split(images, test_fraction)[_SIDES.index(side)]
    parts = []
    for start in range(0, len(images), _READ_AT_ONCE):
        x, _ = images.take(torch.arange(start, min(start + _READ_AT_ONCE, len(images))))
        parts.append(to_uint8(x).permute(0, 3, 1, 2))
    has_labels = not (isinstance(images, ImageFolder) and not images.class_names)
    found = Pictures(source=source, pixels=torch.cat(parts), labels=images.labels if has_labels else None)
    return _of_channels(found, channels)


def _side_of(source: str) -> tuple[str, str | None]:
    """Return a source without the side of its split, and the side."""
    where, colon, side = source.rpartition(":")
    return (where, side) if colon and side in _SIDES else (source, None)


def _images(name: str, where: str, size: int | None, channels: int | None) -> Images:
    """Return bundled data or those of a folder."""
    if where == "mnist":
        return mnist(size=size or _BUNDLED[where][0], channels=channels or _BUNDLED[where][1])
    if where == "digits":
        return digits(size=size or _BUNDLED[where][0])
    folder = Path(where)
    if not folder.is_dir():
        raise UsageError.for_value(name, where, f"an npz, an image folder, {', '.join(_BUNDLED)}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
    if not files:
        raise UsageError.for_value(name, where, f"a folder with images ({', '.join(SUFFIXES)})")
    channels, size = channels or 3, size or _own_size(files[0])
    if any(entry.is_dir() and entry.name[0] != "." for entry in folder.iterdir()):
        return image_folder(folder, size=size, channels=channels, check=False)
    return ImageFolder(
        paths=tuple(files),
        labels=torch.zeros(len(files), dtype=torch.int64),
        class_names=(),
        num_classes=1,
        channels=channels,
        size=size,
    )


def _own_size(file: Path) -> int:
    """Return the side of the square that an image is cut to."""
    try:
        with Image.open(file) as image:
            return min(image.size)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"image: cannot read {file}: {' '.join(str(error).split())}") from error


def _load_npz(name: str, where: str, size: int | None) -> Pictures:
    """Return the images of an npz, or raise `UsageError`."""
    try:
        with Path(where).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("arr_0", "arr_1") if key in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: cannot read the npz {where}: {cause}") from error
    images = arrays.get("arr_0")
    accepted = "arr_0, uint8 of shape (N, H, H, 1 or 3), N at least 1"
    if images is None:
        raise UsageError.for_value(name, where, accepted, "there is no arr_0")
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or shape[1] != shape[2] or 0 in shape:
        raise UsageError.for_value(name, f"arr_0 {images.dtype} {shape}", accepted, f"in {where}")
    if size is not None and shape[1] != size:
        fix = f"its images are {shape[1]} wide; the other images are brought to the samples' size, an npz is not"
        raise UsageError.for_value(name, where, f"images {size} wide", fix)
    labels = arrays.get("arr_1")
    if labels is not None and (labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise UsageError.for_value(name, f"arr_1 {labels.dtype} {labels.shape}", f"integers, ({shape[0]},)", where)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    of_images = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return Pictures(source=where, pixels=pixels, labels=of_images)


def _of_channels(pictures: Pictures, channels: int | None) -> Pictures:
    """Return grey images three times, or the mean of three channels, where another number is wanted."""
    if channels is None or channels == pictures.channels:
        return pictures
    if channels == 3:
        pixels = pictures.pixels.repeat(1, 3, 1, 1)
    else:
        pixels = pictures.pixels.float().mean(1, keepdim=True).round().to(torch.uint8)
    return Pictures(source=pictures.source, pixels=pixels, labels=pictures.labels)
