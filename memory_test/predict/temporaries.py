"""What CUDA operations allocate inside, which no tensor shows: one table, by operation.

Found by asking the caching allocator before and after every operation (torch 2.11.0+cu130, sm_90, on an emulated
runtime); the launch rules behind the sizes are ATen's, named beside each row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memory_test.core.units import MIB
from memory_test.predict.cards import Card
from memory_test.predict.trace import PRODUCTS, Temporary


class CudaTemporaries:
    """What an operation takes inside on a card. One instance a run: a library takes its workspace once a thread."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._have: set[tuple[str, bool]] = set()

    def __call__(self, name: str, args: Sequence[Any], in_backward: bool) -> list[Temporary]:
        """Return what it takes, in the order in which it takes it."""
        if name in PRODUCTS:
            return self._workspaces(name, args, in_backward)
        if name in ("sum", "mean") and len(args) > 1 and isinstance(args[0], Tensor):
            return self._reduction(args[0], args[1])
        if name == "native_layer_norm":
            return [_copy(args[0], before=True)] if not args[0].is_contiguous() else []
        if name == "native_layer_norm_backward":
            return [_copy(tensor, before=True) for tensor in args[:2] if not tensor.is_contiguous()]
        if name == "_scaled_dot_product_efficient_attention_backward":
            return _efficient_backward(args[0])
        if name == "_scaled_dot_product_flash_attention_backward":
            return _flash_backward(args[1])
        return []

    def _workspaces(self, name: str, args: Sequence[Any], in_backward: bool) -> list[Temporary]:
        """cuBLAS's workspace, kept by each thread (ATen/cuda/CublasHandlePool.cpp); products with a bias go by Lt."""  # noqa: D403
        by_lt = name == "addmm" and args[0].dim() == 1 and args[1].shape[0] > 1 and args[2].shape[1] > 1
        found = []
        for library in ("cublas", "lt") if by_lt else ("cublas",):
            if (library, in_backward) not in self._have:
                self._have.add((library, in_backward))
                found.append(Temporary(_same, (self._workspace_bytes(library),), stays=True))
        return found

    def _workspace_bytes(self, library: str) -> int:
        if library == "lt":
            return MIB
        return 32 * MIB if self._card.major == 9 else 8 * MIB + 128 * 1024  # :4096:2:16:8 (KiB)

    def _reduction(self, tensor: Tensor, dims: Any) -> list[Temporary]:
        """Partial sums of a reduction that is spread over blocks (ATen/native/cuda/Reduce.cuh)."""
        sizes, strides, reduced = list(tensor.shape), list(tensor.stride()), _dims(dims, tensor.dim())
        accumulator = 8 if tensor.dtype == torch.float64 else 4
        numbers = (self._card.num_sms, self._card.threads_per_sm, accumulator, len(sizes), *sizes, *strides, *reduced)
        return [Temporary(reduction_bytes, numbers)]


def _same(num_bytes: int) -> int:
    return num_bytes


def _numbers(count: int, element: int) -> int:
    return count * element


def _copy(tensor: Tensor, *, before: bool) -> Temporary:
    """A contiguous copy of an operand."""
    return Temporary(_numbers, (tensor.numel(), tensor.element_size()), before=before)


def _efficient_backward(gradient: Tensor) -> list[Temporary]:
    """float32 accumulators of the memory-efficient kernel (transformers/cuda/attention_backward.cu)."""
    rows = gradient.shape[0] * gradient.shape[1] * gradient.shape[2]
    return [
        Temporary(_numbers, (gradient.numel(), 4)),
        Temporary(_numbers, (rows, 4)),
        Temporary(_numbers, (rows, 4)),
    ]


def _flash_backward(query: Tensor) -> list[Temporary]:
    """float32 accumulators of the flash kernel, padded to its tiles (transformers/cuda/flash_attn/flash_api.cpp)."""
    batch, heads, rows, width = query.shape
    rows, width = -(-rows // 128) * 128, -(-width // 32) * 32
    return [
        Temporary(_numbers, (batch * heads * rows, 4)),
        Temporary(_numbers, (batch * rows * heads * width, 4)),
    ]


def _dims(dims: Any, count: int) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(count))
    return [dim % count for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def reduction_bytes(num_sms: int, threads_per_sm: int, accumulator: int, count: int, *rest: int) -> int:
    """Return the bytes of the buffer in which blocks leave partial sums; 0 if each sum is one block's.

    Args:
        num_sms: Of the card.
        threads_per_sm: Of the card.
        accumulator: Bytes of a partial sum.
        count: Number of dimensions.
        rest: Sizes, strides, then the dimensions that are reduced.
    """
    sizes, strides, dims = rest[:count], rest[count : 2 * count], set(rest[2 * count :])
    reduced = sorted((strides[d], sizes[d]) for d in dims if sizes[d] > 1)
    kept = sorted((strides[d], sizes[d]) for d in range(count) if d not in dims and sizes[d] > 1)
    if not reduced:
        return 0
    inputs, outputs = _product(reduced), _product(kept)
    along = not kept or reduced[0][0] < kept[0][0]  # whether the reduced dimension is the fastest
    first, second, stride = (inputs, outputs, reduced[0][0]) if along else (outputs, inputs, kept[0][0])
    vector = 1
    if stride == 1:
        if along and first > 128 and not kept:
            first //= 4
        elif not along:
            vector = 4
            while vector > 1 and (kept[0][1] % vector or any(step % vector for step, _ in reduced + kept[1:])):
                vector //= 2
            first //= vector
    most = 512 // vector
    width, height = min(_power(first), most), min(_power(second), most)
    across = min(width, 32)
    height = min(height, most // across)
    across = min(width, most // height)
    threads = across * height
    step_in, step_out = (across, 1) if along else (1, across)
    split = False
    if -(-inputs // step_in) >= min(16 * height, 256):
        split, step_in = True, step_in * height
    else:
        step_out *= height
    per_thread = -(-inputs // step_in)
    blocks = -(-(outputs // vector) // step_out)
    wanted = num_sms * (threads_per_sm // threads)
    if not split or per_thread < 256 or blocks > wanted:
        return 0
    shares = max(min(-(-wanted // blocks), -(-per_thread // 16)), -(-per_thread // 256))
    if shares <= 1:
        return 0
    num_bytes = accumulator * outputs * shares
    return num_bytes if along else num_bytes * across * vector


def _product(pairs: list[tuple[int, int]]) -> int:
    result = 1
    for _, size in pairs:
        result *= size
    return result


def _power(number: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (max(1, number).bit_length() - 1)
