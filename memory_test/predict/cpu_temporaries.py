"""What CPU operations allocate inside, which no tensor shows: attention's scores of a block of queries, by thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memory_test.predict.trace import Temporary

_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class CpuTemporaries:
    """What an operation takes inside on the CPU; in half precision attention takes more, which is not counted.

    Attributes:
        num_threads: Each of which has a buffer of its own.
    """

    num_threads: int

    def __call__(self, name: str, args: Sequence[Any], in_backward: bool) -> list[Temporary]:
        """Return what it takes."""
        if name not in (_ATTENTION, f"{_ATTENTION}_backward"):
            return []
        query, key = args[1:3] if name.endswith("_backward") else args[:2]
        if query.dtype != torch.float32:
            return []
        backward = int(name.endswith("_backward"))
        numbers = (self.num_threads, query.shape[2], key.shape[2], query.shape[3], backward)
        return [Temporary(attention_bytes, numbers)]


def attention_bytes(num_threads: int, num_queries: int, num_keys: int, width: int, backward: int) -> int:
    """Return what attention in float32 takes (ATen/native/cpu/FlashAttentionKernel.cpp).

    Forward: scores, two numbers a query and its output. Backward: scores, their gradients and a number a query.
    """
    block = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    queries, keys = min(block, num_queries), min(512, num_keys)
    numbers = queries * (2 * keys + 1) if backward else queries * (keys + 2 + width)
    return 4 * num_threads * numbers
