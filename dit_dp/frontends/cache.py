"""Latents of a data set in files: encoded once, then read as images are.

Shapes: M images, N drawn ones, C latent channels, h = w latent positions.

A folder holds ``manifest.json`` (what the latents are of, see `Manifest`), ``rows.safetensors`` (labels and digests of
the images) and shards, ``shard-<number>-<SHA-256>.safetensors``. A shard gets its name, and with it its hash, in one
step when it is whole, so a process may end at any moment: what is finished is kept, what is not is encoded again.

**Guarantees**: a folder is only ever added to; one of other images, another front-end, size or dtype is refused by the
name of what differs. What is read was verified against its hash. Latents are of single images: no image has a share in
another's, so units are kept apart as they are without a cache. **Edge cases**: images are encoded as they are drawn,
once: there is no augmentation, neither flips nor crops, in a cached training. Encoding in other batch sizes or on
another device may change latents by rounding, which is not part of a cache's identity.
"""

import fcntl
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from dit_dp import validate
from dit_dp.data import Images
from dit_dp.errors import UsageError
from dit_dp.files import write_whole
from dit_dp.frontends.frontend import Frontend, digest_of
from dit_dp.frontends.manifest import MANIFEST_FILE, Manifest, load_manifest, save_manifest

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 2**26
"""About what a shard takes: what has to be encoded again at most when a process ends."""

_ROWS_FILE = "rows.safetensors"
_LOCK_FILE = ".lock"
_SHARD_NAME = re.compile(r"shard-(\d+)-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedLatents(Images):
    """Latents with labels, of which those that are drawn are read from their memory-mapped shards.

    Attributes:
        folder: The cache.
        manifest: What it is of.
        shards: Files, in order.
        numbers: (M,) int64, row of each latent in the cache.
        labels: (M,) int64.
        image_digests: (M, 32) uint8, SHA-256 of each image.
        num_classes: Number of labels.
        channels: C.
        size: h = w.
    """

    folder: Path
    manifest: Manifest
    shards: tuple[Path, ...]
    numbers: Tensor
    labels: Tensor
    image_digests: Tensor
    num_classes: int
    channels: int
    size: int

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents (N, C, h, w) float32, at the scale of `Frontend.encode`, and labels (N,) by number, (N,).

        Raises:
            UsageError: A shard cannot be read any more.
        """
        rows = self.numbers[index]
        latents = torch.empty(len(rows), self.channels, self.size, self.size)
        per_shard = self.manifest.rows_per_shard
        for number in sorted(set((rows // per_shard).tolist())):
            places = (rows // per_shard == number).nonzero()[:, 0].tolist()
            try:
                state = self.shards[number].stat()
                stored = _mapped(self.shards[number], (state.st_ino, state.st_mtime_ns, state.st_size))
                for place in places:
                    latents[place] = stored[int(rows[place]) % per_shard]
            except (OSError, SafetensorError) as error:
                cause = " ".join(str(error).split())
                raise UsageError(f"latent_cache: cannot read {self.shards[number]}: {cause}") from error
        return latents, self.labels[index]

    def subset(self, index: Sequence[int]) -> Self:
        """Return some of the latents, in this order."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return replace(
            self,
            numbers=self.numbers[chosen],
            labels=self.labels[chosen],
            image_digests=self.image_digests[chosen],
        )

    def digests(self) -> list[str]:
        """Return the SHA-256 of each image's content, as the images do: a split of latents is the images' split."""
        return [bytes(row).hex() for row in self.image_digests.numpy()]


def encode_data(
    images: Images,
    frontend: Frontend,
    folder: Path | str,
    batch_size: int = 32,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> CachedLatents:
    """Return the latents of images: a folder's, if they are all there, after encoding those that are not.

    Of several processes that are given one folder (ranks), one encodes while the others wait.

    Args:
        images: Pixels, of the size at which they are to be encoded.
        frontend: What encodes them; a VAE's posterior mean is what is kept.
        folder: Made if there is none; may hold a cache of the same images, front-end, size and dtype, and no other.
        batch_size: Images encoded at a time.
        dtype: That latents are stored in: ``float32``, ``bfloat16``, ``float16``. They are read as float32.
        shard_bytes: Size of a shard, about; of a new cache.

    Raises:
        UsageError: Latents instead of images, a size that does not fit, a cache of something else, a shard that was
            altered, a folder that cannot be written or a full disk.
    """
    validate.integer("batch_size", batch_size)
    validate.integer("shard_bytes", shard_bytes)
    validate.one_of("dtype", dtype, DTYPES)
    _refuse_latents(images, frontend)
    rows = _rows_of(images)
    place, wanted = Path(folder).expanduser(), _manifest_of(images, frontend, dtype, shard_bytes, digest_of(rows))
    try:
        manifest = _there(place, wanted)
        shards = _verified(place, manifest) if manifest is not None else {}
        if manifest is None or len(shards) < manifest.num_shards:  # else a folder that can only be read will do
            place.mkdir(parents=True, exist_ok=True)
            with _alone_in(place):
                manifest = _begin(place, wanted, rows)
                shards = _verified(place, manifest, shards)
                _encode_missing(images, frontend, place, manifest, shards, batch_size)
    except OSError as error:
        raise UsageError(f"latent_cache: cannot write to {place}: {error.strerror or error}") from error
    return _open(place, manifest, shards)


def open_cache(folder: Path | str) -> CachedLatents:
    """Return the latents of a finished cache without its images and front-end, every file verified by its hash.

    Raises:
        UsageError: There is none, it is not finished, or a file is missing, truncated or altered.
    """
    place = Path(folder).expanduser()
    manifest = load_manifest(place)
    shards = _verified(place, manifest)
    absent = [number for number in range(manifest.num_shards) if number not in shards]
    if absent:
        fix = "encode_data makes those that are missing"
        raise UsageError(f"latent_cache: {place} has no shard {absent[0]} of {manifest.num_shards}; {fix}")
    return _open(place, manifest, shards)


def _refuse_latents(images: Images, frontend: Frontend) -> None:
    """Raise `UsageError` unless there are images that a front-end takes."""
    if isinstance(images, CachedLatents):
        raise UsageError.for_value("images", f"latents of {images.folder}", "images", "they are encoded already")
    if images.channels != frontend.image_channels or not len(images):
        accepted = f"images of {frontend.image_channels} channels, at least one"
        found = f"{len(images)} of {images.channels} channels"
        raise UsageError.for_value("images", found, accepted, "a front-end takes pixels, not latents")


def _manifest_of(images: Images, frontend: Frontend, dtype: str, shard_bytes: int, data: str) -> Manifest:
    """Return what a cache of these images is of."""
    size = frontend.latent_size(images.size)
    row_bytes = frontend.latent_channels * size * size * DTYPES[dtype].itemsize
    return Manifest(
        data=data,
        num_images=len(images),
        image_size=images.size,
        num_classes=images.num_classes,
        frontend=frontend.name,
        weights=frontend.weights,
        settings=frontend.settings(),
        dtype=dtype,
        channels=frontend.latent_channels,
        size=size,
        rows_per_shard=max(1, shard_bytes // row_bytes),
    )


def _rows_of(images: Images) -> dict[str, Tensor]:
    """Return labels (M,) and digests (M, 32), which tell one data set from another."""
    digests = torch.frombuffer(bytearray.fromhex("".join(images.digests())), dtype=torch.uint8).view(-1, 32)
    return {"labels": images.labels.to(torch.int64).cpu().contiguous(), "digests": digests}


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system lets go of when a process ends."""
    with (folder / _LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("latent cache: waiting for another process that encodes into %s", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _there(folder: Path, wanted: Manifest) -> Manifest | None:
    """Return the manifest of a folder, `None` if it is new, or raise `UsageError` if it is of something else."""
    if (folder / MANIFEST_FILE).exists():
        there = load_manifest(folder)
        wanted.refuse_another(there, folder)
        return there
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strangers = [name for name in names if name[0] != "." and name != _ROWS_FILE]
    if strangers:
        accepted = f"an empty folder or a cache of latents (it has {strangers[0]})"
        raise UsageError.for_value("latent_cache", str(folder), accepted, "nothing was overwritten")
    return None


def _begin(folder: Path, wanted: Manifest, rows: dict[str, Tensor]) -> Manifest:
    """Return a folder's manifest, which is written if it is new; remove what a killed process left half written."""
    there = _there(folder, wanted)
    for name in ("shard-*", _ROWS_FILE, MANIFEST_FILE):
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink()
    if there is None:
        write_whole(folder / _ROWS_FILE, save(rows))
        save_manifest(wanted, folder)
        return wanted
    return there


def _encode_missing(
    images: Images, frontend: Frontend, folder: Path, manifest: Manifest, shards: dict[int, Path], batch_size: int
) -> None:
    """Encode and write the shards that are not there, and add them to those that are."""
    missing = [number for number in range(manifest.num_shards) if number not in shards]
    if missing and shards:
        log.info("latent cache: %d of %d shards are there already", len(shards), manifest.num_shards)
    for number in missing:
        first = number * manifest.rows_per_shard
        last = min(first + manifest.rows_per_shard, manifest.num_images)
        batches = [torch.arange(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
        parts = [_encoded(images, frontend, numbers, DTYPES[manifest.dtype]) for numbers in batches]
        content = save({"latents": torch.cat(parts)})
        path = folder / f"shard-{number:05d}-{_hash_of(manifest, number, [content])}.safetensors"
        write_whole(path, content)
        shards[number] = path
        log.info("latent cache: encoded %d of %d images", last, manifest.num_images)


def _encoded(images: Images, frontend: Frontend, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the latents of some images as they are stored, or raise `UsageError` if they cannot be."""
    latents = frontend.encode(images.take(numbers)[0]).to(dtype).cpu()
    finite = torch.isfinite(latents).flatten(1).all(1)
    if not finite.all():
        image = int(numbers[~finite][0])
        fix = "" if dtype == torch.float32 else f"; or it does not fit into {dtype}: store float32"
        raise UsageError(f"latent_cache: the latents of image {image} are not finite{fix}")
    return latents


def _verified(folder: Path, manifest: Manifest, known: dict[int, Path] | None = None) -> dict[int, Path]:
    """Return the shards of a folder by number, each read and compared with its hash unless it is known.

    Raises:
        UsageError: A shard is not what it was.
    """
    found: dict[int, Path] = dict(known or {})
    for path in sorted(folder.glob("shard-*.safetensors")):
        name = _SHARD_NAME.fullmatch(path.name)
        if name is None or int(name[1]) >= manifest.num_shards or found.get(int(name[1])) == path:
            continue
        if _hash_of(manifest, int(name[1]), _chunks(path)) != name[2]:
            fix = "delete it, and encode_data makes it again"
            raise UsageError(f"latent_cache: {path} was truncated or altered, or is of another cache; {fix}")
        found[int(name[1])] = path
    return found


def _hash_of(manifest: Manifest, number: int, chunks: Iterable[bytes]) -> str:
    """Return the SHA-256 of a shard's place, which is of one cache and one number in it, and of its content."""
    total = hashlib.sha256(f"{manifest.key} {manifest.rows_per_shard} {number}\n".encode())
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's content, or raise `UsageError`."""
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(2**20):
                yield chunk
    except OSError as error:
        raise UsageError(f"latent_cache: cannot read {path}: {error.strerror or error}") from error


@lru_cache(maxsize=128)
def _mapped(shard: Path, state: tuple[int, int, int]) -> Any:
    """Return a shard's latents, of which what is asked for is read; kept open while the file's state stays."""
    opened: Any = safe_open(shard, framework="pt")
    return opened.get_slice("latents")


def _open(folder: Path, manifest: Manifest, shards: dict[int, Path]) -> CachedLatents:
    """Return the latents of a folder whose shards are all there and verified."""
    file = folder / _ROWS_FILE
    try:
        rows = load(b"".join(_chunks(file)))
    except SafetensorError as error:
        raise UsageError(f"latent_cache: cannot read {file}: {' '.join(str(error).split())}; encode anew") from error
    if digest_of(rows) != manifest.data:
        raise UsageError(f"latent_cache: {file} was altered, or is of another cache; encode anew into another folder")
    return CachedLatents(
        folder=folder,
        manifest=manifest,
        shards=tuple(shards[number] for number in range(manifest.num_shards)),
        numbers=torch.arange(manifest.num_images),
        labels=rows["labels"],
        image_digests=rows["digests"],
        num_classes=manifest.num_classes,
        channels=manifest.channels,
        size=manifest.size,
    )
