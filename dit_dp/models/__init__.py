"""Diffusion transformers that every clipping method accepts.

Names are resolved on first use, so that reading `dit_dp.models.registry` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dit_dp.models.registry import MODELS, ModelSize, model_names, parse_model_name

if TYPE_CHECKING:
    from dit_dp.models.dit import DiT
    from dit_dp.models.pretrained import DiTHuggingFaceWrapper

_LAZY = {"DiT": "dit_dp.models.dit", "DiTHuggingFaceWrapper": "dit_dp.models.pretrained"}

__all__ = [
    "MODELS",
    "DiT",
    "DiTHuggingFaceWrapper",
    "ModelSize",
    "model_names",
    "parse_model_name",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
