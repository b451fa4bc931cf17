"""Frozen front-ends, which turn images into latents and back, and the cache of latents.

Names are resolved on first use, so that reading `dit_dp.frontends.registry` does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.frontends.registry import FRONTENDS, make_frontend
from dit_dp.lazy import lazily

if TYPE_CHECKING:
    from dit_dp.frontends.cache import CachedLatents, encode_data, open_cache
    from dit_dp.frontends.frontend import Frontend
    from dit_dp.frontends.rae import RAEFrontend
    from dit_dp.frontends.statistics import (
        LatentStatistics,
        PrivateStatistics,
        fit_statistics,
        load_statistics,
        save_statistics,
    )
    from dit_dp.frontends.vae import VAEFrontend

_LAZY = {
    "CachedLatents": "cache",
    "encode_data": "cache",
    "open_cache": "cache",
    "Frontend": "frontend",
    "RAEFrontend": "rae",
    "LatentStatistics": "statistics",
    "PrivateStatistics": "statistics",
    "fit_statistics": "statistics",
    "load_statistics": "statistics",
    "save_statistics": "statistics",
    "VAEFrontend": "vae",
}

__all__ = [
    "FRONTENDS",
    "CachedLatents",
    "Frontend",
    "LatentStatistics",
    "PrivateStatistics",
    "RAEFrontend",
    "VAEFrontend",
    "encode_data",
    "fit_statistics",
    "load_statistics",
    "make_frontend",
    "open_cache",
    "save_statistics",
]


__getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for name, module in _LAZY.items()})
