"""The configurations that `make emulator-check` compares."""

from dataclasses import dataclass, field
from typing import Any

from dit_dp.clipping.registry import METHODS
from memory_test.core.config import ExperimentConfig
from memory_test.core.units import MIB
from memory_test.predict.settings import AllocatorSettings


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration.

    Attributes:
        changes: What differs from a default `ExperimentConfig`.
        settings: Of the allocator, for both sides.
    """

    changes: dict[str, Any]
    settings: AllocatorSettings = field(default_factory=AllocatorSettings)

    @property
    def name(self) -> str:
        """What differs, in words."""
        parts = [str(value) if key in _PLAIN else f"{key}={value}" for key, value in self.changes.items()]
        options = allocator_options(self.settings)
        fraction = self.settings.memory_fraction
        return " ".join(parts + ([options] if options else []) + ([f"fraction:{fraction:g}"] if fraction else []))

    def resolved(self) -> dict[str, Any]:
        """Return the configuration in full."""
        return ExperimentConfig(**self.changes).resolve(device="cuda", num_threads=1)


_PLAIN = ("model", "experiment", "dtype")


def allocator_options(settings: AllocatorSettings) -> str:
    """Return settings as torch's ``PYTORCH_ALLOC_CONF`` has them; the fraction is not among those."""
    options = []
    if settings.expandable_segments:
        options.append("expandable_segments:True")
    if settings.max_split_bytes is not None:
        options.append(f"max_split_size_mb:{settings.max_split_bytes // MIB}")
    if settings.garbage_collection_threshold:
        options.append(f"garbage_collection_threshold:{settings.garbage_collection_threshold:g}")
    return ",".join(options)


def _case(method: str, model: str, batch: int, settings: AllocatorSettings | None = None, **changes: Any) -> Case:
    named = {"model": f"DiT-{model}/2", "experiment": method, "batch_size": batch, **changes}
    return Case(changes=named, settings=settings or AllocatorSettings())


_BF16: dict[str, Any] = {"dtype": "bf16"}
_CHECKPOINTED: dict[str, Any] = {"activation_checkpointing": True}
_PX512: dict[str, Any] = {"image_size": 512}
EXPANDABLE = AllocatorSettings(expandable_segments=True)
_UNSPLIT = AllocatorSettings(max_split_bytes=64 * MIB)


def _collecting(fraction: float) -> AllocatorSettings:
    return AllocatorSettings(garbage_collection_threshold=0.6, memory_fraction=fraction)


CASES: tuple[Case, ...] = (
    *(_case(method, "S", 8) for method in METHODS),
    *(
        _case(method, "B", 16, **_BF16)
        for method in METHODS
        if METHODS[method].supports_autocast and method != "microbatch"
    ),
    # batches
    *(_case("vanilla", "S", batch) for batch in (1, 128)),
    *(_case("bookkeeping", "S", batch) for batch in (1, 128)),
    *(_case("ghost", "S", batch) for batch in (1, 128)),
    _case("opacus-ghost", "S", 1),
    _case("microbatch", "B", 3, **_BF16),
    # sizes
    *(_case("vanilla", "XL", batch) for batch in (1, 32)),
    _case("vanilla", "L", 16),
    _case("vanilla", "XL", 64, **_BF16),
    *(_case("bookkeeping", "XL", batch) for batch in (4, 32)),
    _case("bookkeeping", "XL", 64, **_BF16),
    _case("ghost", "L", 16),
    _case("ghost", "XL", 32),
    _case("flash_clip_bk", "XL", 16, **_BF16),
    _case("flash_clip", "XL", 16, **_BF16),
    _case("lean", "XL", 128, **_BF16),
    _case("auto", "XL", 32),
    _case("per_layer", "XL", 16),
    _case("opacus", "XL", 8),
    _case("opacus-ghost", "XL", 16),
    # 512 pixels
    _case("vanilla", "S", 8, **_PX512),
    _case("bookkeeping", "B", 8, **_PX512, **_BF16),
    _case("ghost", "L", 8, **_PX512),
    _case("opacus-ghost", "B", 4, **_PX512),
    _case("flash_clip", "B", 4, **_PX512),
    # activation checkpointing
    _case("vanilla", "XL", 32, **_CHECKPOINTED),
    _case("vanilla", "L", 64, **_CHECKPOINTED, **_BF16),
    _case("bookkeeping", "B", 32, **_CHECKPOINTED),
    _case("ghost", "B", 16, **_CHECKPOINTED, **_BF16),
    _case("flash_clip_bk", "S", 16, **_CHECKPOINTED),
    # optimizers
    _case("vanilla", "B", 4, optimizer_impl="fused"),
    _case("vanilla", "B", 4, optimizer_impl="for-loop"),
    _case("bookkeeping", "L", 2, optimizer_impl="fused"),
    _case("opacus", "B", 2, optimizer_impl="for-loop"),
    _case("bookkeeping", "B", 4, optimizer="adam"),
    _case("vanilla", "XL", 4, optimizer="sgd"),
    _case("ghost", "B", 4, optimizer="sgd", optimizer_impl="for-loop"),
    # the allocator's options
    _case("vanilla", "L", 8, EXPANDABLE),
    _case("bookkeeping", "XL", 8, EXPANDABLE),
    _case("opacus", "B", 8, EXPANDABLE),
    _case("lean", "L", 16, EXPANDABLE, **_BF16),
    _case("bookkeeping", "B", 16, _UNSPLIT),
    _case("opacus-ghost", "L", 8, _UNSPLIT),
    _case("vanilla", "B", 16, _collecting(0.08)),
    _case("ghost", "B", 16, _collecting(0.08)),
)
