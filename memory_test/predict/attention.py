"""Which attention kernel a CUDA device would run, and its operation in ATen.

torch picks the first of cuDNN's, the flash and the memory-efficient kernel that takes the operands
(``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``); what none takes is computed by plain products.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from dit_dp.clipping.contributions import HALF
from memory_test.predict.cards import Card

Backend = Literal["cudnn", "flash", "efficient", "math"]

_aten = torch.ops.aten


def attend(
    card: Card,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run attention as the card would; arguments as of `torch.nn.functional.scaled_dot_product_attention`."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    backend = choose(card, query, attn_mask)
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    out: Tensor
    scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    width = value.shape[-1]
    if backend == "math":
        out = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale
        )[0]
        return out
    if backend == "flash":
        query, key, value = (_padded(t, 8) for t in (query, key, value))
        out = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if out.shape[-1] != width else out
    bias = _bias(attn_mask, query, key)
    options: tuple[Any, ...] = (dropout_p, is_causal)
    if backend == "cudnn":
        kernel, options = _aten._scaled_dot_product_cudnn_attention, (*options, False)
    else:
        kernel = _aten._scaled_dot_product_efficient_attention
    out = kernel(query, key, value, bias, saves, *options, scale=scale)[0]
    return out


def choose(card: Card, query: Tensor, attn_mask: Tensor | None) -> Backend:
    """Return the kernel torch picks on a card for such operands."""
    half, width = query.dtype in HALF, query.shape[-1]
    if query.dim() != 4 or query.dtype == torch.float64:
        return "math"
    wanted = card.attention
    if wanted == "auto":
        if half and card.major == 9 and width <= 256 and width % 8 == 0:
            return "cudnn"
        wanted = "flash" if half else "efficient"
    if wanted == "flash" and (not half or attn_mask is not None or card.major < 8 or width > 256):
        wanted = "efficient"
    return wanted


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return tensor if not missing else torch.nn.functional.pad(tensor, (0, missing))


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Any:
    """Return a mask as an additive one of full shape."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
