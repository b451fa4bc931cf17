"""Which precision layers compute in, and norms and clipped sums: full float32, whatever a program allows itself.

TF32 on CUDA and bf16 on CPUs keep 11 and 8 bits of an operand. A model may be trained so; a norm that is rounded so
lets a contribution exceed C by as much.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_TORCH: Any = torch.backends
_BACKENDS = (_TORCH.cuda.matmul, _TORCH.mkldnn.matmul)
_AS_IT_IS = contextlib.nullcontext()


def full_float32() -> contextlib.AbstractContextManager[None]:
    """Return a scope in which products of float32 tensors are taken in float32; entered at every layer's call."""
    return _AS_IT_IS if is_full_float32() else _raised()


def is_full_float32() -> bool:
    """Return whether the program allows itself nothing less."""
    return all(backend.fp32_precision in ("ieee", "none") for backend in _BACKENDS)


@contextlib.contextmanager
def _raised() -> Iterator[None]:
    """Take back what the program allows, meanwhile.

    torch has two names for what is allowed, and refuses to read one after the other was set: what the program used is
    asked for, and put back.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    try:
        by_older_name: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer one
        by_older_name = None
    if by_older_name not in (None, "highest"):
        torch.set_float32_matmul_precision("highest")
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if by_older_name not in (None, "highest"):
            torch.set_float32_matmul_precision(by_older_name)
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = "none"  # as others are, which is what most programs leave it at
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks for on this tensor's device, if it is on and the tensor floats."""
    device = x.device.type
    active = torch.is_autocast_enabled(device) and (x.is_floating_point() and x.dtype != torch.float64)
    return torch.get_autocast_dtype(device) if active else None
