"""The model of the caching allocator against the real one: its own requests, replayed, must give its own actions."""

from bisect import bisect_right, insort
from typing import Any

from memory_test.predict.allocator import Block, CachingAllocator, OutOfMemoryError
from memory_test.predict.settings import AllocatorSettings

Action = tuple[str, int, int, int]
"""What was done, in which segment (by order of birth), where in it, and to how many bytes."""

ACTIONS = ("alloc", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap")
"""Kinds in torch's history that move memory. A free is also noted when it is asked for; on one stream that is when it
is done."""


class _Places:
    """Turns addresses, which two allocators do not share, into segments and offsets, which they must.

    Args:
        span: Least size of the address space of an expandable segment.
    """

    def __init__(self, span: int) -> None:
        self._span = span
        self._begins: list[int] = []
        self._numbers: dict[int, int] = {}
        self.actions: list[Action] = []

    def add(self, action: str, address: int, num_bytes: int) -> None:
        """Append an action of one of the allocators."""
        index = bisect_right(self._begins, address) - 1
        mapped_anew = action == "segment_map" and (index < 0 or address - self._begins[index] >= self._span)
        if action == "segment_alloc" or mapped_anew:
            insort(self._begins, address)
            self._numbers[address] = len(self._numbers)
            index = bisect_right(self._begins, address) - 1
        begin = self._begins[index]
        self.actions.append((action, self._numbers[begin], address - begin, num_bytes))


def compare(history: list[dict[str, Any]], settings: AllocatorSettings, capacity: int) -> tuple[int, str | None]:
    """Replay a history's requests.

    Args:
        history: A device's trace from torch's memory snapshot, from the first allocation on.
        settings: Of the allocator that wrote it.
        capacity: Bytes of the device.

    Returns:
        How many actions there are, and the first that differs, if one does.
    """
    span = capacity * 9 // 8
    real, model = _Places(span), _Places(span)
    allocator = CachingAllocator(
        settings, capacity, lambda action, *where: model.add("free_completed" if action == "free" else action, *where)
    )
    blocks: dict[int, Block] = {}
    for entry in history:
        if entry["action"] in ACTIONS:
            real.add(entry["action"], entry["addr"], entry["size"])
        try:
            if entry["action"] == "alloc":
                blocks[entry["addr"]] = allocator.malloc(entry["size"])
            elif entry["action"] == "free_completed":
                allocator.free(blocks.pop(entry["addr"]))
        except OutOfMemoryError as error:
            return len(real.actions), f"action {len(real.actions)}: the model runs out of memory, {error}"
    for index, (wanted, found) in enumerate(zip(real.actions, model.actions, strict=False)):
        if wanted != found:
            return len(real.actions), f"action {index}: {wanted}, in the model {found}"
    if len(real.actions) != len(model.actions):
        return len(real.actions), f"{len(real.actions)} actions, in the model {len(model.actions)}"
    return len(real.actions), None
