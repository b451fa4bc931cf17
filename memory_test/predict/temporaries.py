"""What CUDA operations allocate inside, which no tensor shows: one table, by operation.

Found in the caching allocator's history of every operation (torch 2.11.0+cu130, sm_90, on the emulated runtime of
`memory_test.predict.emulator`); the launch rules behind the sizes are ATen's, named beside each row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from memory_test.core.units import MIB
from memory_test.predict.cards import Card
from memory_test.predict.flops import PRODUCTS
from memory_test.predict.trace import Temporary


class CudaTemporaries:
    """What an operation takes inside on a card. One instance a run: a library takes its workspace once a thread."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._have: set[tuple[str, bool]] = set()

    def __call__(self, name: str, args: Sequence[Any], in_backward: bool) -> list[Temporary]:
        """Return what it takes, in the order in which it takes it."""
        if name in PRODUCTS:
            return self._workspaces(name, args, in_backward)
        if name in _REDUCTIONS and isinstance(args[0], Tensor):
            return self._reduction(name, args)
        if name == "native_layer_norm":
            return [_copy(args[0], before=True)] if not args[0].is_contiguous() else []
        if name == "native_layer_norm_backward":
            return [_copy(tensor, before=True) for tensor in args[:2] if not tensor.is_contiguous()]
        if name == "_scaled_dot_product_efficient_attention_backward":
            return _efficient_backward(args[0], args[1])
        if name == "_scaled_dot_product_flash_attention":
            return _flash_forward(args[0], args[1].shape[2], self._card.num_sms)
        if name == "_scaled_dot_product_flash_attention_backward":
            return _flash_backward(args[1])
        if name == "convolution":
            return self._convolution(args[0], args[1], in_backward)
        if name == "convolution_backward":
            return self._convolution_backward(args[0], args[1], args[2], in_backward)
        return []

    def _workspaces(self, name: str, args: Sequence[Any], in_backward: bool) -> list[Temporary]:
        """cuBLAS's workspace, kept by each thread (ATen/cuda/CublasHandlePool.cpp); products with a bias go by Lt."""  # noqa: D403
        by_lt = name == "addmm" and args[0].dim() == 1 and min(args[2].shape) > 1  # (ATen/native/cuda/Blas.cpp)
        return self._first_use(("cublas", "lt") if by_lt else ("cublas",), in_backward)

    def _first_use(self, libraries: Sequence[str], in_backward: bool) -> list[Temporary]:
        found = []
        for library in libraries:
            if (library, in_backward) not in self._have:
                self._have.add((library, in_backward))
                found.append(Temporary(_same, (self._workspace_bytes(library),), stays=True))
        return found

    def _workspace_bytes(self, library: str) -> int:
        if library == "lt":
            return MIB
        return 32 * MIB if self._card.major == 9 else 8 * MIB + 128 * 1024  # :4096:2:16:8 (KiB)

    def _reduction(self, name: str, args: Sequence[Any]) -> list[Temporary]:
        """Partial results of a reduction spread over blocks, and their counters (ATen/native/cuda/Reduce.cuh)."""
        tensor, place = args[0], _REDUCTIONS[name]
        sizes, strides = list(tensor.shape), list(tensor.stride())
        reduced = _dims(args[place] if len(args) > place else None, tensor.dim())
        accumulator = tensor.element_size() if name == "any" else max(4, tensor.element_size())
        numbers = (self._card.num_sms, self._card.threads_per_sm, accumulator, len(sizes), *sizes, *strides, *reduced)
        return [Temporary(reduction_bytes, numbers), Temporary(counter_bytes, numbers)]

    def _convolution(self, tensor: Tensor, weight: Tensor, in_backward: bool) -> list[Temporary]:
        """torch's own: one example's patches as columns, then a product (ATen/native/cuda/ConvolutionMM2d.cu)."""  # noqa: D403
        if self._card.cudnn_convolution:
            return []
        return [_columns(tensor, weight), *self._first_use(("cublas",), in_backward)]

    def _convolution_backward(
        self, gradient: Tensor, tensor: Tensor, weight: Tensor, in_backward: bool
    ) -> list[Temporary]:
        """Either library's brings the gradient into the input's layout (ATen/native/cudnn/ConvShared.cpp)."""
        found = [] if gradient.is_contiguous() else [_copy(gradient, before=True)]
        return found + self._convolution(tensor, weight, in_backward)


_REDUCTIONS = {"sum": 1, "mean": 1, "any": 1, "linalg_vector_norm": 2}
"""By reduction: which argument names the dimensions; all of them if there is none."""


def _same(num_bytes: int) -> int:
    return num_bytes


def _numbers(count: int, element: int) -> int:
    return count * element


def _copy(tensor: Tensor, *, before: bool) -> Temporary:
    """A contiguous copy of an operand."""
    return Temporary(_numbers, (tensor.numel(), tensor.element_size()), before=before)


def _columns(tensor: Tensor, weight: Tensor) -> Temporary:
    """One example's patches; those of a patch embedding cover the input once."""
    covered = tensor.numel() // tensor.shape[0] // tensor.shape[1]
    return Temporary(_numbers, (tensor.shape[1] * covered, tensor.element_size()))


def _efficient_backward(gradient: Tensor, query: Tensor) -> list[Temporary]:
    """Of the memory-efficient kernel: the rows' gradient . output, and the accumulator of the query's gradient.

    The former is made by the kernel for half precision, else by operators: a product, its sum, a copy of that
    (transformers/cuda/attention_backward.cu, mem_eff_attention/kernel_backward.h).
    """
    batch, heads, positions, width = query.shape
    rows = Temporary(_numbers, (batch * heads * positions, 4))
    half = query.element_size() == 2
    numbers = (batch * heads, positions, width, int(half))
    if half:
        return [rows, Temporary(accumulator_bytes, numbers)]
    product = Temporary(_numbers, (gradient.numel(), 4), last=2)
    return [product, replace(rows, last=2), rows, Temporary(accumulator_bytes, numbers)]


def accumulator_bytes(heads: int, positions: int, width: int, half: int) -> int:
    """Return the bytes of the memory-efficient kernel's accumulator: by tile of the query, one float32 tile and a lock.

    Args:
        heads: Heads of all examples.
        positions: Of the query.
        width: Of a head.
        half: 1 for half precision, 0 for float32.
    """
    if width <= 64:
        tile, columns = 64, 64
    elif width <= 128:
        tile, columns = (128 if half else 64), 128
    else:
        tile, columns = 128, 64
    return heads * -(-positions // tile) * -(-width // columns) * 4 * (4 + tile * columns)


def _flash_forward(query: Tensor, keys: int, num_sms: int) -> list[Temporary]:
    """Results by share of the keys, if heads are too few for the card (transformers/cuda/flash_attn/flash_api.cpp)."""
    batch, heads, positions, width = query.shape
    rows, padded = batch * heads * positions, -(-width // 32) * 32
    numbers = (batch * heads, positions, keys, width, num_sms)
    return [
        Temporary(split_bytes, (*numbers, rows)),
        Temporary(split_bytes, (*numbers, rows * padded)),
    ]


def split_bytes(heads: int, positions: int, keys: int, width: int, num_sms: int, count: int) -> int:
    """Return the bytes of `count` float32 numbers a share; 0 if the keys are not shared out."""
    shares = num_shares(
        heads * -(-positions // 64), 2 * num_sms, -(-keys // (256 if width <= 64 else 128 if width <= 128 else 64))
    )
    return 4 * count * shares if shares > 1 else 0


def num_shares(rows: int, slots: int, blocks: int) -> int:
    """Return into how many shares flash attention divides the keys: the fewest that fill the slots nearly best.

    Args:
        rows: Blocks of the query, over all heads.
        slots: Blocks that run at once.
        blocks: Blocks of the keys, at most so many shares.
    """
    if rows >= 0.8 * slots:
        return 1
    use: dict[int, float] = {}
    for shares in range(1, min(128, slots, blocks) + 1):
        if shares == 1 or -(-blocks // shares) != -(-blocks // (shares - 1)):
            waves = rows * shares / slots
            use[shares] = waves / -(-rows * shares // slots)
    return next(shares for shares, share in use.items() if share >= 0.85 * max(use.values()))


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


def reduction_bytes(*numbers: int) -> int:
    """Return the bytes of the buffer in which blocks leave partial results; 0 if each result is one block's.

    Args:
        numbers: The card's multiprocessors and threads of each; bytes of a partial result; number of dimensions;
            sizes, strides, then the dimensions that are reduced.
    """
    return _spread(*numbers)[0]


def counter_bytes(*numbers: int) -> int:
    """Return the bytes of the counters by which a block knows that it is the last; arguments as above."""
    return _spread(*numbers)[1]


def _spread(num_sms: int, threads_per_sm: int, accumulator: int, count: int, *rest: int) -> tuple[int, int]:
    """Return the bytes of partial results and of counters."""
    sizes, strides, dims = rest[:count], rest[count : 2 * count], set(rest[2 * count :])
    reduced = sorted((strides[d], sizes[d]) for d in dims if sizes[d] > 1)
    kept = sorted((strides[d], sizes[d]) for d in range(count) if d not in dims and sizes[d] > 1)
    if not reduced:
        return 0, 0
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
        return 0, 0
    shares = max(min(-(-wanted // blocks), -(-per_thread // 16)), -(-per_thread // 256))
    if shares <= 1:
        return 0, 0
    num_bytes = accumulator * outputs * shares
    return num_bytes if along else num_bytes * across * vector, 4 * blocks


def _product(pairs: list[tuple[int, int]]) -> int:
    result = 1
    for _, size in pairs:
        result *= size
    return result


def _power(number: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (max(1, number).bit_length() - 1)
