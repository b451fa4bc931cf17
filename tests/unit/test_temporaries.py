"""What CUDA operations take inside. Byte counts are the caching allocator's own: torch 2.11.0+cu130 for an H100."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_test.predict.cards import CARDS
from memory_test.predict.cpu_temporaries import CpuTemporaries, attention_bytes
from memory_test.predict.imagine import imagine
from memory_test.predict.predict import STAND_INS
from memory_test.predict.roofline import Rates, rule_seconds
from memory_test.predict.temporaries import (
    CudaTemporaries,
    accumulator_bytes,
    counter_bytes,
    num_shares,
    reduction_bytes,
    split_bytes,
)
from memory_test.predict.trace import Trace
from memory_test.predict.tracer import Tracer

H100 = replace(CARDS["H100-80GB"], cudnn_convolution=False)


def taken(name: str, *args: Any) -> list[tuple[int, bool, int | None]]:
    """Return what an operation takes in a backward whose libraries have their workspaces: bytes, before, last."""
    temporaries = CudaTemporaries(H100)
    temporaries("mm", [], True)
    return [(each.rule(*each.numbers), each.before, each.last) for each in temporaries(name, args, True)]


def heads(batch: int, count: int, positions: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(batch, count, positions, width, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("sizes", "strides", "dims", "num_bytes", "counters"),
    [
        ((2048, 384), (384, 1), [0], 6291456, 12),
        ((2048, 1536), (1536, 1), [0], 25165824, 48),
        ((2048, 1152), (1152, 1), [0], 18874368, 36),
        ((8, 147456), (147456, 1), [1], 576, 32),
        ((8, 384384), (384384, 1), [1], 1504, 32),
        ((8, 884736), (884736, 1), [1], 2112, 32),
        ((2, 393216), (393216, 1), [1], 384, 8),
        ((1, 256, 1536), (393216, 1536, 1), [0, 1, 2], 192, 4),
        ((8, 3), (3, 1), [1], 0, 0),
    ],
)
def test_reductions_over_blocks(
    sizes: tuple[int, ...], strides: tuple[int, ...], dims: list[int], num_bytes: int, counters: int
) -> None:
    numbers = (132, 2048, 4, len(sizes), *sizes, *strides, *dims)
    assert reduction_bytes(*numbers) == num_bytes
    assert counter_bytes(*numbers) == counters


@pytest.mark.parametrize(
    ("name", "args", "num_bytes"),
    [
        ("any", (torch.empty(2, 393216, dtype=torch.bfloat16, device="meta"), 1), 192),
        ("any", (torch.empty(1, 256, 1536, dtype=torch.bfloat16, device="meta"),), 96),
        ("linalg_vector_norm", (torch.empty(8, 147456, device="meta"), 2, [-1]), 576),
    ],
)
def test_other_reductions_than_sums(name: str, args: tuple[Any, ...], num_bytes: int) -> None:
    assert taken(name, *args)[0][0] == num_bytes


@pytest.mark.parametrize(
    ("positions", "width", "half", "num_bytes"),
    [
        (256, 32, 0, 524800),
        (100, 64, 0, 262400),
        (256, 72, 0, 1049088),
        (1024, 72, 0, 4196352),
        (256, 128, 0, 1049088),
        (256, 160, 0, 1573632),
        (256, 72, 1, 1048832),
        (1024, 64, 1, 2099200),
    ],
)
def test_accumulators_of_memory_efficient_attention(positions: int, width: int, half: int, num_bytes: int) -> None:
    assert accumulator_bytes(8, positions, width, half) == num_bytes


def test_what_precedes_that_accumulator_is_gone_before_it() -> None:
    gradient = heads(8, 6, 256, 64)
    assert taken("_scaled_dot_product_efficient_attention_backward", gradient, gradient) == [
        (3145728, False, 2),
        (49152, False, 2),
        (49152, False, None),
        (3148800, False, None),
    ]
    gradient = heads(2, 4, 256, 72, torch.bfloat16)
    found = taken("_scaled_dot_product_efficient_attention_backward", gradient, gradient)
    assert [num_bytes for num_bytes, _, _ in found] == [8192, 1048832]


@pytest.mark.parametrize(("positions", "width", "num_bytes"), [(256, 72, 1572864), (1024, 64, 4194304)])
def test_flash_attention_shares_out_the_keys_of_few_heads(positions: int, width: int, num_bytes: int) -> None:
    query = heads(2, 4, positions, width, torch.bfloat16)
    assert [size for size, _, _ in taken("_scaled_dot_product_flash_attention", query, query)] == [
        2 * 8 * positions * 4,
        num_bytes,
    ]


def test_flash_attention_of_many_heads_shares_out_nothing() -> None:
    assert split_bytes(48, 256, 256, 64, 132, 1000) == 0
    assert num_shares(rows=264, slots=264, blocks=8) == 1
    assert num_shares(rows=1, slots=264, blocks=1) == 1


def test_flash_attention_backward() -> None:
    query = heads(2, 4, 256, 72, torch.bfloat16)
    found = taken("_scaled_dot_product_flash_attention_backward", query, query)
    assert [size for size, _, _ in found] == [8192, 786432]


def test_convolution_by_torch_takes_columns_and_by_cudnn_nothing_that_is_known() -> None:
    images, weight = torch.empty(8, 4, 32, 32, device="meta"), torch.empty(384, 4, 2, 2, device="meta")
    gradient = torch.empty(8, 384, 16, 16, device="meta").contiguous(memory_format=torch.channels_last)
    assert taken("convolution", images, weight) == [(16384, False, None)]
    assert taken("convolution_backward", gradient, images, weight) == [(3145728, True, None), (16384, False, None)]
    assert CudaTemporaries(CARDS["H100-80GB"])("convolution", [images, weight], False) == []


# --- what autograd does otherwise with tensors that have data ---------------------------------------------------------


def births_in_backward(*, create_graph: bool = False) -> int:
    """Return the storages born in the backward of ``2 y + 3 y``, where y is not a leaf."""
    tracer = Tracer(stand_ins=STAND_INS)
    with imagine(tracer, H100, rule_seconds(Rates.ceilings(H100))):
        x = torch.empty(1000, device="cuda").requires_grad_()
        y = x * 5
        total = (y * 2 + y * 3).sum()
        before = len(tracer.trace.storages)
        (gradient,) = torch.autograd.grad(total, x, create_graph=create_graph)
        found = len(tracer.trace.storages) - before
        del gradient
        tracer.stop()
    _check_pairs(tracer.trace)
    return found


def _check_pairs(trace: Trace) -> None:
    """Check that every storage is born once, in order, and dies at most once."""
    born: list[int] = []
    died: set[int] = set()
    for event in trace.events:
        if event in born:
            assert event not in died
            died.add(event)
        else:
            born.append(event)
    assert born == list(range(len(trace.storages)))
    assert len(trace.events) == len(trace.event_operations)


def test_gradients_are_added_up_in_the_first_unless_a_graph_is_made() -> None:
    in_place = births_in_backward()
    assert births_in_backward(create_graph=True) > in_place
    # ones of the scalar, two products, the product with 5: the sum of the two is no storage of its own
    assert in_place == 4


@pytest.mark.parametrize(
    ("num_queries", "backward", "num_bytes"),
    [
        (64, 1, 16512),
        (144, 1, 36992),
        (64, 0, 4 * 32 * (64 + 2 + 16)),
        (256, 1, 4 * 64 * 513),
        (1024, 1, 4 * 256 * 1025),
    ],
)
def test_attention_on_the_cpu_takes_a_block_of_scores_a_thread(num_queries: int, backward: int, num_bytes: int) -> None:
    """The first two are the CPU allocator's own, torch 2.13."""
    assert attention_bytes(1, num_queries, num_queries, 16, backward) == num_bytes
    name, each = "_scaled_dot_product_flash_attention_for_cpu", heads(2, 3, num_queries, 16)
    args = [each] * (4 if backward else 3)
    (found,) = CpuTemporaries(2)(f"{name}_backward" if backward else name, args, bool(backward))
    assert found.rule(*found.numbers) == 2 * num_bytes
    assert CpuTemporaries(2)("mm", args, False) == []
