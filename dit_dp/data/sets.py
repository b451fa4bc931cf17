"""Sets of images of one class: privacy units that are formed once and stay.

Shapes: S sets, n drawn ones, M images a set, C channels, H = W = size.

Within a class, images are ordered by a hash of the seed and of their content, and each M that follow each other are a
set: where an image stands in the order depends on the image alone, not on its file name or on when it came. The
partition is written to a file when it is first made, and read from there ever after.

**Guarantees**: an image that occurs once in the data is in at most one set, so that what is said of sets covers it.
Sets formed anew would put an image into several over time, each a unit that has been used: another seed, size or data
set than the file's is refused. **Edge cases**: copies of an image count as images; a class with fewer than M images
has no set.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dit_dp import validate
from dit_dp.data.images import Examples, Images
from dit_dp.errors import UsageError
from dit_dp.files import write_whole

log = logging.getLogger(__name__)

Remainder = Literal["refuse", "drop"]
REMAINDERS: tuple[Remainder, ...] = ("refuse", "drop")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which images are a set, as it stands in a file.

    Attributes:
        format: Version of the file.
        data: `Images.digest` of the images that the numbers are of.
        set_size: M.
        seed: Of the order within a class.
        num_left_out: Images in no set.
        sets: (S, M) numbers of images.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    format: Literal[1] = 1
    data: str
    set_size: int
    seed: int
    num_left_out: int
    sets: list[list[int]]


class ImageSets(Examples):
    """Sets of images of one class.

    Args:
        images: What they are made of.
        partition: Which are together.

    Attributes:
        labels: (S,) int64, the class of each set.
        set_size: M.
        num_left_out: Images in no set.
    """

    def __init__(self, images: Images, partition: Partition) -> None:
        self.images, self.set_size, self.num_left_out = images, partition.set_size, partition.num_left_out
        self.num_classes, self.channels, self.size = images.num_classes, images.channels, images.size
        self._members = torch.tensor(partition.sets)  # (S, M)
        self.labels = images.labels[self._members[:, 0]]

    def __len__(self) -> int:
        """Return S."""
        return len(self._members)

    def take(self, index: Tensor) -> tuple[Tensor, None]:
        """Return sets by number, (n,): (n, M, C, H, W); and no labels, as `Objective.draw` wants it."""
        x, _ = self.images.take(self._members[index].flatten())
        return x.view(len(index), self.set_size, *x.shape[1:]), None

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """Return `count` sets drawn with replacement, (n, M, C, H, W); and no labels."""
        return self.take(torch.randint(0, len(self), (count,), generator=generator))


def sets_of(
    images: Images,
    path: Path | str,
    *,
    set_size: int,
    seed: int = 0,
    remainder: Remainder = "refuse",
    write: bool = True,
) -> ImageSets:
    """Return the sets of a partition: the file's, or, if there is none yet, one that is made and written there.

    Args:
        images: What sets are made of: of training images alone, after `split`.
        path: JSON file of the partition, which belongs to the data from then on.
        set_size: M, at least 2.
        seed: Of the order within a class.
        remainder: Of a class whose number of images M does not divide: ``refuse`` raises; ``drop`` leaves its last
            ones out, counts and logs them.
        write: Whether a new partition is kept; not by who only counts sets.

    Raises:
        UsageError: No set can be formed, images would be left out under ``refuse``, or the file is of another
            partition or none.
    """
    validate.integer("set_size", set_size, minimum=2)
    validate.integer("seed", seed, minimum=0)
    validate.one_of("remainder", remainder, REMAINDERS)
    file = Path(path)
    if file.exists():
        partition = _load(file)
        _refuse_another(partition, file, data=images.digest, set_size=set_size, seed=seed)
        if any(not 0 <= number < len(images) for members in partition.sets for number in members):
            raise UsageError(f"sets: the partition {file} has numbers of images that are not there")
    else:
        partition = _form(images, set_size, seed)
    if not partition.sets:
        raise UsageError.for_value("set_size", set_size, "at most the number of images of the largest class")
    if remainder == "refuse" and partition.num_left_out:
        raise _indivisible(images, partition)
    if partition.num_left_out:
        log.warning("sets: %d of %d images are in no set of %d", partition.num_left_out, len(images), set_size)
    if write and not file.exists():
        _save(partition, file)
    return ImageSets(images, partition)


def _indivisible(images: Images, partition: Partition) -> UsageError:
    """Return what says which classes the size of a set does not divide, and how many images are over."""
    size = partition.set_size
    counts = enumerate(images.labels.bincount().tolist())
    uneven = [f"class {label} has {count}, {count % size} over" for label, count in counts if count % size]
    uneven[_SHOWN:] = [f"{len(uneven) - _SHOWN} more classes"] if len(uneven) > _SHOWN else []
    over = f"{partition.num_left_out} of {len(images)} would be in no set: {', '.join(uneven)}"
    accepted = f"a size that divides the number of images of each class ({over})"
    return UsageError.for_value("set_size", size, accepted, "or set_remainder=drop, which leaves them out")


def _form(images: Images, set_size: int, seed: int) -> Partition:
    """Order each class by a hash of each image and cut it into sets."""
    classes: dict[int, list[tuple[str, int]]] = {}
    for number, (digest, label) in enumerate(zip(images.digests(), images.labels.tolist(), strict=True)):
        place = hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()
        classes.setdefault(label, []).append((place, number))
    sets = []
    for _, ordered in sorted((label, sorted(places)) for label, places in classes.items()):
        numbers = [number for _, number in ordered]
        whole = len(numbers) // set_size * set_size
        sets += [numbers[start : start + set_size] for start in range(0, whole, set_size)]
    left = len(images) - set_size * len(sets)
    return Partition(data=images.digest, set_size=set_size, seed=seed, num_left_out=left, sets=sets)


def _refuse_another(partition: Partition, file: Path, **wanted: object) -> None:
    """Raise `UsageError` if the file's partition was made of, or by, anything else."""
    for name, value in wanted.items():
        there = getattr(partition, name)
        if value != there:
            fix = (
                f"{file} holds the sets that were formed; formed anew, an image would be in several over time, and the "
                f"privacy of sets would not cover it"
            )
            raise UsageError.for_value(f"sets: {name}", value, repr(there), fix)


def _load(file: Path) -> Partition:
    """Read a partition, or raise `UsageError`."""
    try:
        partition: Partition = TypeAdapter(Partition).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        cause = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = str(error) if cause is None else f"{'.'.join(map(str, cause['loc']))} {cause['msg']}".strip()
        raise UsageError(f"sets: cannot read the partition {file}: {' '.join(reason.split())}") from error
    numbers = [number for members in partition.sets for number in members]
    lengths = {len(members) for members in partition.sets}
    if len(set(numbers)) != len(numbers) or not lengths <= {partition.set_size}:
        raise UsageError(f"sets: the partition {file} has sets of other sizes than set_size, or an image twice")
    return partition


def _save(partition: Partition, file: Path) -> None:
    """Write a partition so that a reader sees all of it or nothing; ranks may do it at the same time, all alike."""
    try:
        write_whole(file, json.dumps(asdict(partition)).encode())
    except OSError as error:
        raise UsageError(f"sets: cannot write the partition {file}: {error.strerror or error}") from error
