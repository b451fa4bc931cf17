"""A model of CUDA's caching allocator: what it reserves and counts as allocated for a sequence of requests.

Follows ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.11 to 2.13) for one stream. Requests are rounded to 512 bytes;
those up to 1 MiB come from segments of 2 MiB, those below 10 MiB from segments of 20 MiB, larger ones from a segment of
their own in steps of 2 MiB. The smallest free block that fits is taken; what is left of it is split off. When a card is
full, cached segments are given back and the request is tried once more.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

from memory_test.core.units import MIB
from memory_test.predict.settings import AllocatorSettings

MIN_BLOCK = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
"""Requests of this size and above get a segment of their own, in steps of `SMALL_SEGMENT`."""

UNLIMITED = 1 << 62

Recorder = Callable[[str, int, int], None]
"""Told of (action, address, bytes) in the words of torch's memory snapshots: alloc, free, segment_alloc, ..."""


class OutOfMemoryError(Exception):
    """A request does not fit, with everything cached given back.

    Attributes:
        requested_bytes: The request.
        allocated_bytes, reserved_bytes: The allocator's counters then.
        phase: Of a replayed step, where it happened.
    """

    phase: str | None = None

    def __init__(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int) -> None:
        super().__init__(f"{requested_bytes} bytes on top of {reserved_bytes} reserved")
        self.requested_bytes = requested_bytes
        self.allocated_bytes, self.reserved_bytes = allocated_bytes, reserved_bytes


class Block:
    """A stretch of a segment, in use, cached, or address space without memory."""

    __slots__ = ("address", "base", "expandable", "idle_since", "mapped", "next", "pool", "prev", "requested", "size")

    def __init__(
        self, pool: "_Pool", address: int, size: int, *, expandable: bool = False, mapped: bool = True
    ) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.expandable, self.mapped = expandable, mapped
        self.requested = -1  # not in use
        self.base = 0  # where its expandable segment begins
        self.idle_since = 0
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def in_use(self) -> bool:
        """Whether a request holds it."""
        return self.requested >= 0

    @property
    def is_split(self) -> bool:
        """Whether it is a part of its segment."""
        return self.prev is not None or self.next is not None


class _Pool:
    """Cached blocks in order of size and address; unmapped address space in order of address."""

    def __init__(self, segment_bytes: int, *, small: bool) -> None:
        self.segment_bytes, self.small = segment_bytes, small
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []
        self.num_searches = 0

    def insert(self, block: Block) -> None:
        block.idle_since = self.num_searches
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def insert_unmapped(self, block: Block) -> None:
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class CachingAllocator:
    """One device's allocator; counters as in ``torch.cuda.memory_stats``.

    Args:
        settings: Options.
        capacity_bytes: What the card leaves to the allocator; default: no limit.
        record: Told of every action.
        total_bytes: What `memory_fraction` is a share of; default: `capacity_bytes`.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        capacity_bytes: int | None = None,
        record: Recorder | None = None,
        total_bytes: int | None = None,
    ) -> None:
        self._settings = settings or AllocatorSettings()
        self._capacity = UNLIMITED if capacity_bytes is None else capacity_bytes
        fraction = self._settings.memory_fraction
        self._limit = UNLIMITED if fraction is None else int(fraction * (total_bytes or self._capacity))
        self._max_split = self._settings.max_split_bytes or UNLIMITED
        self._record = record or (lambda action, address, num_bytes: None)
        self._small, self._large = _Pool(SMALL_SEGMENT, small=True), _Pool(LARGE_SEGMENT, small=False)
        self._next_address = 1 << 40
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.num_retries = self.num_segments = 0

    def reset_peaks(self) -> None:
        """Start peaks anew from what is held now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def malloc(self, num_bytes: int) -> Block:
        """Serve a request of at least one byte.

        Raises:
            OutOfMemoryError: It does not fit, even after everything cached was given back.
        """
        size = max(MIN_BLOCK, -(-num_bytes // MIN_BLOCK) * MIN_BLOCK)
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = self._cached(pool, size)
        if block is None:
            if self._limit < UNLIMITED and self._settings.garbage_collection_threshold > 0:
                self._collect_garbage()
            block = self._new(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._new(pool, size)
        if block is None:
            self.empty_cache()
            self.num_retries += 1
            block = self._new(pool, size)
        if block is None:
            raise OutOfMemoryError(num_bytes, self.allocated, self.reserved)
        if self._should_split(block, size):
            block = self._split(block, size)
        block.requested = num_bytes
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        self._record("alloc", block.address, num_bytes)
        return block

    def free(self, block: Block) -> None:
        """Put a block back; it joins free neighbours."""
        self._record("free", block.address, block.requested)
        self.allocated -= block.size
        block.requested = -1
        self._merge(block, block.prev)
        self._merge(block, block.next)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Give back every segment, and of an expandable one every page, that nothing uses."""
        for pool in (self._large, self._small):
            for _, _, block in list(pool.free):
                if not block.expandable and not block.is_split:
                    self._release(block)
            for _, _, block in [entry for entry in pool.free if entry[2].expandable]:
                self._unmap(block)

    # --- requests -------------------------------------------------------------------------------------------

    def _cached(self, pool: _Pool, size: int) -> Block | None:
        """Take the best cached block."""
        pool.num_searches += 1
        free = pool.free
        index = bisect_left(free, (size, 0))
        if index == len(free):
            return None
        block = free[index][2]
        if block.expandable:  # the size it can grow to counts
            while index + 1 < len(free) and _growable(free[index + 1][2]) < _growable(block):
                index += 1
                block = free[index][2]
        if size < self._max_split <= block.size:
            return None
        if size >= self._max_split and block.size >= size + LARGE_SEGMENT:
            return None
        del free[index]
        return block

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """Get memory from the card; `None` if there is not enough."""
        if pool.small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        if self.reserved + segment > self._limit:
            return None
        if self._settings.expandable_segments:
            return self._grow(pool, size)
        if self.reserved + segment > self._capacity:
            return None
        block = Block(pool, self._take_addresses(segment), segment)
        self._reserve(segment)
        self.num_segments += 1
        self._record("segment_alloc", block.address, segment)
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        rest = block.size - size
        if block.pool.small or self._settings.expandable_segments:
            return rest >= MIN_BLOCK
        return size < self._max_split and rest > SMALL_REQUEST

    def _split(self, block: Block, size: int) -> Block:
        """Cut a block off the beginning of another; the rest is cached."""
        first = Block(block.pool, block.address, size, expandable=block.expandable)
        first.base = block.base
        first.prev, first.next = block.prev, block
        if first.prev is not None:
            first.prev.next = first
        block.prev = first
        block.address, block.size = block.address + size, block.size - size
        block.pool.insert(block)
        return first

    def _merge(self, block: Block, other: Block | None) -> None:
        """Join a neighbour in the same state into a block that is in no list."""
        if other is None or other.in_use or other.mapped != block.mapped:
            return
        if other.mapped:
            other.pool.remove(other)
        else:
            other.pool.remove_unmapped(other)
        if other is block.prev:
            block.address, block.prev = other.address, other.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.prev = block
        block.size += other.size

    # --- segments -------------------------------------------------------------------------------------------

    def _take_addresses(self, num_bytes: int) -> int:
        address = self._next_address
        self._next_address += -(-num_bytes // (1 << 30)) * (1 << 30) + (1 << 30)
        return address

    def _reserve(self, num_bytes: int) -> None:
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _release(self, block: Block) -> None:
        """Give back a segment that is one free block."""
        block.pool.remove(block)
        self.reserved -= block.size
        self._record("segment_free", block.address, block.size)

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Give back just enough of the blocks that are too large to be split; return whether that was enough."""
        if self._max_split == UNLIMITED:
            return False
        wanted = max(size, self._max_split)
        index = bisect_left(pool.free, (wanted, 0))
        if index < len(pool.free):
            if pool.free[index][2].expandable:
                return False
            self._release(pool.free[index][2])
            return True
        released = 0
        for block_size, _, block in reversed(pool.free[:]):
            if released >= wanted or block_size < self._max_split:
                break
            if not block.expandable:
                released += block_size
                self._release(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Give back whole segments that were idle for longest, until the threshold is kept."""
        excess = self.reserved - int(self._settings.garbage_collection_threshold * self._limit)
        if excess <= 0:
            return
        pool, reclaimed, freed = self._large, 0, True
        while reclaimed < excess and freed:
            idle = [block for _, _, block in pool.free if not block.is_split and not block.expandable]
            if not idle:
                return
            ages = [pool.num_searches - block.idle_since for block in idle]
            total, count, freed = sum(ages), len(ages), False
            threshold = total / count
            for block, age in zip(idle, ages, strict=True):
                if age >= threshold:
                    freed = True
                    reclaimed += block.size
                    self._release(block)

    # --- expandable segments --------------------------------------------------------------------------------

    def _grow(self, pool: _Pool, size: int) -> Block | None:
        """Map pages at the lowest address where a request finds room; `None` if the card has no more."""
        block = self._room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        pool.remove(block)
        return block

    def _room(self, pool: _Pool, size: int) -> Block:
        """Return the first block from which on unused addresses are enough."""
        for _, block in pool.unmapped:
            first = block.prev if block.prev is not None and not block.prev.in_use else block
            found, at = 0, first
            while found < size and at is not None and not at.in_use:
                found += at.size
                at = at.next  # type: ignore[assignment]
            if found >= size:
                return first
        capacity = self._capacity if self._capacity < UNLIMITED else 1 << 42
        space = -(-(capacity * 9 // 8) // pool.segment_bytes) * pool.segment_bytes
        block = Block(pool, self._take_addresses(space), space, expandable=True, mapped=False)
        block.base = block.address
        pool.insert_unmapped(block)
        self.num_segments += 1
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Back the beginning of unmapped address space with whole pages; the block is cached then."""
        pool = block.pool
        num_bytes = -(-size // pool.segment_bytes) * pool.segment_bytes
        if self.reserved + num_bytes > self._capacity:
            return False
        pool.remove_unmapped(block)
        block.mapped = True
        if num_bytes < block.size:
            rest = Block(pool, block.address + num_bytes, block.size - num_bytes, expandable=True, mapped=False)
            rest.base = block.base
            rest.prev, rest.next = block, block.next
            if rest.next is not None:
                rest.next.prev = rest
            block.next, block.size = rest, num_bytes
            pool.insert_unmapped(rest)
        self._record("segment_map", block.address, num_bytes)
        self._merge(block, block.prev)
        self._merge(block, block.next)
        pool.insert(block)
        self._reserve(num_bytes)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages inside a free block."""
        pool, page = block.pool, block.pool.segment_bytes
        begin = block.base + -(-(block.address - block.base) // page) * page
        end = block.base + (block.address + block.size - block.base) // page * page
        if end <= begin:
            return
        pool.remove(block)
        if begin > block.address:
            self._cut_free(block, block.address, begin - block.address, before=True)
        if end < block.address + block.size:
            self._cut_free(block, end, block.address + block.size - end, before=False)
        block.address, block.size, block.mapped = begin, end - begin, False
        self.reserved -= end - begin
        self._record("segment_unmap", begin, end - begin)
        self._merge(block, block.prev)
        self._merge(block, block.next)
        pool.insert_unmapped(block)

    def _cut_free(self, block: Block, address: int, size: int, *, before: bool) -> None:
        """Cache a mapped piece that is left beside pages given back."""
        piece = Block(block.pool, address, size, expandable=True)
        piece.base = block.base
        if before:
            piece.prev, piece.next = block.prev, block
            if piece.prev is not None:
                piece.prev.next = piece
            block.prev = piece
        else:
            piece.prev, piece.next = block, block.next
            if piece.next is not None:
                piece.next.prev = piece
            block.next = piece
        block.pool.insert(piece)


def _growable(block: Block) -> int:
    """Return a free block's size and that of the unmapped addresses behind it."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)
