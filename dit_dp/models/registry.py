"""Models as plain data: families, and sizes by name. No torch, so that a command line can validate against it."""

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_dp.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

PATCH_SIZES = (2, 4, 8)
LATENT_DOWNSAMPLE = 8
"""Pixels per latent position of the Stable Diffusion VAE that the reference DiT was trained on."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Depth, width and number of attention heads of one member of the family."""

    depth: int
    hidden_size: int
    num_heads: int


MODELS: dict[str, ModelSize] = {
    "DiT-S": ModelSize(depth=12, hidden_size=384, num_heads=6),
    "DiT-B": ModelSize(depth=12, hidden_size=768, num_heads=12),
    "DiT-L": ModelSize(depth=24, hidden_size=1024, num_heads=16),
    "DiT-XL": ModelSize(depth=28, hidden_size=1152, num_heads=16),
}
"""Sizes of Peebles & Xie (arXiv 2212.09748), Table 1."""


@dataclass(frozen=True, kw_only=True)
class DDTSize:
    """Widths, depths and attention heads of a `DiTwDDTHead`: encoder, decoder."""

    hidden_size: tuple[int, int]
    depth: tuple[int, int]
    num_heads: tuple[int, int]


DDT_SIZES: dict[str, DDTSize] = {
    "DDT-S": DDTSize(hidden_size=(384, 384), depth=(6, 2), num_heads=(6, 6)),
    "DDT-B": DDTSize(hidden_size=(768, 512), depth=(12, 2), num_heads=(12, 8)),
    "DDT-L": DDTSize(hidden_size=(1152, 1152), depth=(28, 2), num_heads=(16, 16)),
    "DDT-XL": DDTSize(hidden_size=(1152, 2048), depth=(28, 2), num_heads=(16, 16)),
}
"""Sizes of the project's documents, which give no more than the width of L; its depth and heads are XL's."""

FAMILIES: dict[str, str] = {
    "dit": "dit_dp.models.dit:DiT",
    "diffusers": "dit_dp.models.pretrained:DiTHuggingFaceWrapper",
    "x2": "dit_dp.models.dual_stream:DualStreamDiT",
    "set": "dit_dp.models.set_dit:SetDiT",
    "ddt": "dit_dp.models.ddt:DiTwDDTHead",
    "panda": "dit_dp.models.panda:PandaDiT",
}
"""Every kind of model, as ``module:class``."""


def model_class(family: str) -> "type[nn.Module]":
    """Import and return the class of a family.

    Raises:
        UsageError: No key of `FAMILIES`.
    """
    if family not in FAMILIES:
        raise UsageError.for_value("model family", family, FAMILIES)
    module, _, name = FAMILIES[family].partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found


_HUB_NAME = re.compile(r"facebook/DiT-XL-2-(256|512)")


def model_names() -> list[str]:
    """Return every name `parse_model_name` accepts, without hub names: ``DiT-S/2`` ... ``DiT-XL/8``."""
    return [f"{size}/{patch}" for size in MODELS for patch in PATCH_SIZES]


def parse_model_name(name: str) -> tuple[str, int | None]:
    """Split a model name into its size and its patch size.

    Args:
        name: ``DiT-XL/2``, ``DiT-XL`` (patch size left open), or a hub name such as
            ``facebook/DiT-XL-2-256``, which names the architecture DiT-XL/2.

    Returns:
        The size's key in `MODELS` and the patch size, or `None` where the name leaves it open.

    Raises:
        UsageError: The name is none of these.
    """
    if _HUB_NAME.fullmatch(name):
        return "DiT-XL", 2
    size, slash, patch = name.partition("/")
    if size in MODELS and (not slash or patch in {str(p) for p in PATCH_SIZES}):
        return size, int(patch) if slash else None
    raise UsageError.for_value("model", name, [*model_names(), "facebook/DiT-XL-2-256"])
