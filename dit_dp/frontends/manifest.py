"""What a cache of latents is of, as it stands in its folder. No torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from dit_dp.errors import UsageError
from dit_dp.files import write_whole

MANIFEST_FILE = "manifest.json"

_FIXES = {
    "data": "the images, their order or their labels are others",
    "weights": "the front-end has other weights or normalises by other statistics",
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache is of, and how it lies in its folder.

    Attributes:
        format: Version of the layout.
        data: SHA-256 of the images' digests and labels, in order.
        num_images: M.
        image_size: Side that images were encoded at, pixels.
        num_classes: Number of labels.
        frontend: Name of the front-end.
        weights: SHA-256 of its weights.
        settings: What else decides on its latents.
        dtype: That latents are stored in.
        channels: C of the latents.
        size: h = w of the latents.
        rows_per_shard: Images in a shard, but for the last one.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    format: Literal[1] = 1
    data: str
    num_images: int
    image_size: int
    num_classes: int
    frontend: str
    weights: str
    settings: dict[str, str]
    dtype: str
    channels: int
    size: int
    rows_per_shard: int

    @property
    def identity(self) -> dict[str, Any]:
        """All that makes the latents what they are, but not how they lie in their folder."""
        return {name: value for name, value in asdict(self).items() if name != "rows_per_shard"}

    @property
    def key(self) -> str:
        """SHA-256 of the identity: caches of one key hold the same latents."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_images // self.rows_per_shard)

    def refuse_another(self, there: "Manifest", folder: Path) -> None:
        """Raise `UsageError` naming what differs if a folder's manifest is of another cache than this one."""
        if there.key == self.key:
            return
        wanted, found = self.identity, there.identity
        differing = [field.name for field in fields(self) if wanted.get(field.name) != found.get(field.name)]
        first = differing[0]
        also = f" (also: {', '.join(differing[1:])})" if differing[1:] else ""
        reason = f"; {_FIXES[first]}" if first in _FIXES else ""
        raise UsageError.for_value(
            f"latent_cache: {first}",
            wanted[first],
            f"{found[first]!r}, what {folder} holds the latents of{also}{reason}",
            "give another folder; nothing was overwritten",
        )


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        UsageError: There is none, or it is none.
    """
    try:
        content = (folder / MANIFEST_FILE).read_bytes()
        manifest: Manifest = TypeAdapter(Manifest).validate_json(content, strict=True)
    except OSError as error:
        raise UsageError(f"latent_cache: {folder} is no cache of latents: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise UsageError(f"latent_cache: cannot read {folder / MANIFEST_FILE}: {' '.join(reason.split())}") from error
    if min(manifest.num_images, manifest.rows_per_shard, manifest.channels, manifest.size) < 1:
        raise UsageError(f"latent_cache: cannot read {folder / MANIFEST_FILE}: a count in it is below 1")
    return manifest


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest, all of it or nothing; lets `OSError` pass."""
    write_whole(folder / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())
