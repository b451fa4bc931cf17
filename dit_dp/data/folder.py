"""Folders of images, ``root/class_name/*.png``, as ImageNet is kept.

Shapes: M images, N drawn ones, C channels, H = W = size.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_dp import validate
from dit_dp.data.images import Images
from dit_dp.errors import UsageError

log = logging.getLogger(__name__)

SUFFIXES = (".jpeg", ".jpg", ".png")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Images):
    """Images that are read when they are drawn, cut to a centred square, resized and brought to [-1, 1].

    Attributes:
        paths: M files.
        labels: (M,) int64.
        class_names: By label.
        num_classes: Classes of the folder, whether there are images of them here or not.
        num_corrupt: Files that were left out since they cannot be read.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    num_classes: int
    channels: int
    size: int
    num_corrupt: int = 0

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (N, C, H, W) and labels (N,) by number, (N,).

        Raises:
            UsageError: An image cannot be read; names it.
        """
        x = torch.empty(len(index), self.channels, self.size, self.size)
        for row, number in enumerate(index.tolist()):
            x[row] = _read(self.paths[number], self.channels, self.size)
        return x, self.labels[index]

    def subset(self, index: Sequence[int]) -> Self:
        """Return some of the images, in this order."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        some = replace(self, paths=tuple(self.paths[number] for number in index), labels=self.labels[chosen])
        if "_digests" in vars(self):
            vars(some)["_digests"] = [self._digests[number] for number in index]
        return some

    def digests(self) -> list[str]:
        """Return the SHA-256 of each file; the first call reads all of them, and a subset does not read them again."""
        return list(self._digests)

    @cached_property
    def _digests(self) -> list[str]:
        return [hashlib.sha256(_bytes_of(path)).hexdigest() for path in self.paths]


def image_folder(
    root: Path | str,
    *,
    size: int,
    channels: int = 3,
    classes: Sequence[int] | None = None,
    check: bool = True,
    skip_corrupt: bool = False,
) -> ImageFolder:
    """Return the images of a folder whose folders are classes.

    A label is the place of its folder's name among all of them, sorted, whichever classes are asked for. Hidden
    folders, and files of other kinds than `SUFFIXES`, are passed over; the latter are counted in the log.

    Args:
        root: Folder of folders.
        size: Side that images are brought to, pixels.
        channels: 3, or 1 for grey.
        classes: Labels to keep; `None`: all.
        check: Decode every image once, now. Without, one that cannot be read is an error when it is drawn.
        skip_corrupt: Leave out, count and log images that cannot be read, instead of raising.

    Raises:
        UsageError: No such folder, a class that is not there or has no image, an image that cannot be read.
    """
    validate.integer("size", size)
    if channels not in _MODES:
        raise UsageError.for_value("channels", channels, "1 (grey), 3", "images of a folder are no latents")
    if skip_corrupt and not check:
        raise UsageError.for_value("check", check, "True", "skip_corrupt=True has to read every image")
    names = _class_names(Path(root))
    found = _files(Path(root), names, _chosen(classes, names))
    images = ImageFolder(
        paths=tuple(path for path, _ in found),
        labels=torch.tensor([label for _, label in found]),
        class_names=tuple(names),
        num_classes=len(names),
        channels=channels,
        size=size,
    )
    return _checked(images, skip_corrupt) if check else images


def _class_names(folder: Path) -> list[str]:
    """Return the names of a folder's folders, sorted, or raise `UsageError` if there is none."""
    found = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != ".") if folder.is_dir() else []
    if not found:
        raise UsageError.for_value("data_folder", str(folder), "a folder with one folder for each class")
    return found


def _chosen(classes: Sequence[int] | None, names: Sequence[str]) -> list[int]:
    """Return the labels to keep, or raise `UsageError` on one that is none."""
    if classes is None:
        return list(range(len(names)))
    accepted = f"labels from 0 to {len(names) - 1}"
    if not classes:
        raise UsageError.for_value("classes", classes, accepted, "leave the option out to keep all")
    for label in classes:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names):
            raise UsageError.for_value("classes", label, accepted, "the place of the class among the sorted folders")
    return sorted(set(classes))


def _files(folder: Path, names: Sequence[str], labels: Sequence[int]) -> list[tuple[Path, int]]:
    """Return the images of some classes with their labels, sorted, or raise `UsageError` if a class has none."""
    found: list[tuple[Path, int]] = []
    others = 0
    for label in labels:
        files = sorted(path for path in (folder / names[label]).iterdir() if path.is_file() and path.name[0] != ".")
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not images:
            reason = f"class {label} has no image ({', '.join(SUFFIXES)})"
            raise UsageError.for_value("data_folder", str(folder / names[label]), "a folder with images", reason)
        found += [(path, label) for path in images]
        others += len(files) - len(images)
    if others:
        log.info("%s: passed over %d files that are no images (%s)", folder, others, ", ".join(SUFFIXES))
    return found


def _checked(images: ImageFolder, skip_corrupt: bool) -> ImageFolder:
    """Read every image once; leave out, or raise on, what cannot be read."""
    kept, problems = [], []
    for number, path in enumerate(images.paths):
        try:
            _read(path, images.channels, images.size)
        except UsageError as error:
            problems.append(str(error))
        else:
            kept.append(number)
    if not problems:
        return images
    if not kept or not skip_corrupt:
        fix = "" if not kept else ", or leave them out by skip_corrupt"
        raise UsageError(f"{problems[0]}; {len(problems)} of {len(images)} images are like it: repair them{fix}")
    for problem in problems:
        log.warning("%s; left out", problem)
    log.warning("left out %d of %d images, which cannot be read", len(problems), len(images))
    return replace(images.subset(kept), num_corrupt=len(problems))


def _bytes_of(path: Path) -> bytes:
    """Return a file's content, or raise `UsageError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"image: cannot read {path}: {error.strerror or error}") from error


def _read(path: Path, channels: int, size: int) -> Tensor:
    """Return an image, (C, H, W) in [-1, 1], or raise `UsageError` naming the file."""
    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":
                raise ValueError(f"mode {file.mode}, not 8 bits a channel")
            image = file.convert(_MODES[channels])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"image: cannot read {path}: {cause or type(error).__name__}") from error
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(size, size, channels)  # (H, W, C)
    return pixels.permute(2, 0, 1) / 127.5 - 1
