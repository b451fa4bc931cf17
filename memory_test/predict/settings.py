"""Settings of the caching allocator, for who asks and for who models it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AllocatorSettings:
    """The options of ``PYTORCH_ALLOC_CONF`` that change what is reserved.

    Attributes:
        expandable_segments: One growing segment a pool instead of many.
        max_split_bytes: Larger blocks are never split; `None`: no such limit. (``max_split_size_mb``)
        garbage_collection_threshold: Share of the limit from which idle segments are given back before the card is
            full; as in torch, it acts only together with `memory_fraction`.
        memory_fraction: Share of the card that may be reserved; `None`: no limit but the card.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    garbage_collection_threshold: float = 0.0
    memory_fraction: float | None = None
