"""Diffusion transformers that every clipping method accepts.

Names are resolved on first use, so that reading `dit_dp.models.registry` does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.lazy import lazily
from dit_dp.models.registry import (
    DDT_SIZES,
    FAMILIES,
    MODELS,
    DDTSize,
    ModelSize,
    model_class,
    model_names,
    parse_model_name,
)

if TYPE_CHECKING:
    from dit_dp.models.ddt import DiTwDDTHead
    from dit_dp.models.dit import DiT
    from dit_dp.models.dual_stream import DualStreamDiT
    from dit_dp.models.panda import PandaDiT
    from dit_dp.models.pretrained import DiTHuggingFaceWrapper
    from dit_dp.models.set_dit import SetDiT

_LAZY = {name: module for module, _, name in (path.partition(":") for path in FAMILIES.values())}

__all__ = [
    "DDT_SIZES",
    "FAMILIES",
    "MODELS",
    "DDTSize",
    "DiT",
    "DiTHuggingFaceWrapper",
    "DiTwDDTHead",
    "DualStreamDiT",
    "ModelSize",
    "PandaDiT",
    "SetDiT",
    "model_class",
    "model_names",
    "parse_model_name",
]


__getattr__ = lazily(__name__, _LAZY)
