"""A predicted step in the format of torch's memory snapshots, which https://pytorch.org/memory_viz opens."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_dp.errors import UsageError
from memory_test.predict.predict import Imagined
from memory_test.predict.replay import replay
from memory_test.predict.settings import AllocatorSettings


@dataclass
class _Recorder:
    """Follows an allocator's actions and keeps the last of them in the viewer's words."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    segments: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)

    def __call__(self, action: str, address: int, num_bytes: int) -> None:
        now = len(self.entries)
        entry = {"addr": address, "size": num_bytes, "stream": 0, "time_us": now, "compile_context": "", "frames": []}
        if action == "free":  # the viewer takes the two halves that a stream can part
            self.blocks.pop(address, None)
            self.entries += [{**entry, "action": "free_requested"}, {**entry, "action": "free_completed"}]
            return
        self.entries.append({**entry, "action": action})
        if action == "alloc":
            self.blocks[address] = num_bytes
        elif action in ("segment_alloc", "segment_map"):
            self.segments[address] = num_bytes
        else:
            self.segments.pop(address, None)

    def snapshot(self) -> dict[str, Any]:
        """Return the final state of segments and blocks, and the trace that led there."""
        return {
            "segments": [self._segment(address, size) for address, size in sorted(self.segments.items())],
            "device_traces": [self.entries],
            "allocator_settings": {},
            "external_annotations": [],
        }

    def _segment(self, address: int, size: int) -> dict[str, Any]:
        inside = sorted((at, length) for at, length in self.blocks.items() if address <= at < address + size)
        blocks, end = [], address
        for at, length in inside:
            if at > end:
                blocks.append(_block(end, at - end, "inactive"))
            blocks.append(_block(at, length, "active_allocated"))
            end = at + length
        if end < address + size:
            blocks.append(_block(end, address + size - end, "inactive"))
        held = sum(length for _, length in inside)
        return {
            "device": 0,
            "address": address,
            "total_size": size,
            "allocated_size": held,
            "active_size": held,
            "requested_size": held,
            "stream": 0,
            "segment_type": "small" if size <= 2 << 20 else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": blocks,
        }


def _block(address: int, size: int, state: str) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": size, "state": state, "frames": []}


def snapshot(run: Imagined, settings: AllocatorSettings | None = None) -> dict[str, Any]:
    """Return what `torch.cuda.memory._snapshot` would, for a run on a card large enough."""
    recorder = _Recorder()
    replay(run.trace, run.places, settings=settings, record=recorder)
    return recorder.snapshot()


def write_snapshot(run: Imagined, settings: AllocatorSettings, path: Path) -> None:
    """Write it as torch does, pickled.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        with path.open("wb") as file:
            pickle.dump(snapshot(run, settings), file)
    except OSError as error:
        raise UsageError(f"snapshot: cannot write {path}: {error.strerror}") from error
