"""The model of the caching allocator: what holds for any sequence of requests."""

import contextlib
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_test.core.units import MIB
from memory_test.predict.allocator import Block, CachingAllocator, OutOfMemoryError
from memory_test.predict.settings import AllocatorSettings

SETTINGS = {
    "native": AllocatorSettings(),
    "expandable": AllocatorSettings(expandable_segments=True),
    "max_split": AllocatorSettings(max_split_bytes=32 * MIB),
    "garbage": AllocatorSettings(garbage_collection_threshold=0.6, memory_fraction=0.9),
}

sizes = st.one_of(st.integers(1, 4096), st.integers(4096, 2 * MIB), st.integers(2 * MIB, 64 * MIB))


@pytest.mark.parametrize("kind", SETTINGS)
@given(requests=st.lists(st.tuples(sizes, st.booleans()), max_size=60), seed=st.integers(0, 2**32 - 1))
def test_blocks_in_use_are_apart_and_counted(kind: str, requests: list[tuple[int, bool]], seed: int) -> None:
    allocator = CachingAllocator(SETTINGS[kind], capacity_bytes=512 * MIB)
    chosen, held = random.Random(seed), list[Block]()
    for num_bytes, frees in requests:
        if frees and held:
            allocator.free(held.pop(chosen.randrange(len(held))))
        with contextlib.suppress(OutOfMemoryError):
            held.append(allocator.malloc(num_bytes))
        assert all(block.size >= block.requested for block in held)
        spans = sorted((block.address, block.address + block.size) for block in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert allocator.allocated == sum(block.size for block in held)
        assert allocator.allocated <= allocator.reserved <= 512 * MIB
        assert allocator.peak_reserved >= allocator.reserved
    for block in held:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated == 0
    assert allocator.reserved == 0


def test_small_requests_share_a_segment_and_large_ones_have_their_own() -> None:
    allocator = CachingAllocator()
    small = [allocator.malloc(1000) for _ in range(3)]
    assert [block.size for block in small] == [1024] * 3
    assert allocator.reserved == 2 * MIB
    allocator.malloc(3 * MIB)
    assert allocator.reserved == 22 * MIB
    allocator.malloc(4 * MIB)  # from the rest of the 20 MiB
    assert allocator.reserved == 22 * MIB
    allocator.malloc(11 * MIB)
    assert allocator.reserved == 22 * MIB  # 13 MiB were left of it
    allocator.malloc(11 * MIB)
    assert allocator.reserved == 34 * MIB  # a segment of its own, in steps of 2 MiB


def test_a_full_card_gives_back_its_cache_once() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(80 * MIB)
    assert allocator.num_retries == 1
    assert allocator.reserved == 80 * MIB
    with pytest.raises(OutOfMemoryError) as raised:
        allocator.malloc(30 * MIB)
    assert raised.value.reserved_bytes == 80 * MIB


def test_an_expandable_segment_grows_where_many_would_not_fit() -> None:
    """A block freed in the middle and one at the end are of no use to native segments of their own."""
    peaks = {}
    for kind in ("native", "expandable"):
        allocator = CachingAllocator(SETTINGS[kind])
        for num_bytes in range(20 * MIB, 120 * MIB, 20 * MIB):  # each a little larger than the last
            allocator.free(allocator.malloc(num_bytes))
        peaks[kind] = allocator.peak_reserved
    assert peaks == {"native": 300 * MIB, "expandable": 100 * MIB}
