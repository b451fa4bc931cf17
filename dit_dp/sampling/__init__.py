"""From a trained model to samples: ancestral, DDIM and Euler steps over any path, guidance, grids and npz files.

Names are resolved on first use, so that reading `dit_dp.sampling.config` does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.lazy import lazily
from dit_dp.sampling.config import GUIDE_CHANNELS, SAMPLERS, VARIANCES, SamplingConfig

if TYPE_CHECKING:
    from dit_dp.sampling.images import grid, save_grid, save_images, save_npz, to_uint8
    from dit_dp.sampling.sampler import iterate, labels_for, sample_from
    from dit_dp.sampling.weights import evaluating

_LAZY = {
    "evaluating": "dit_dp.sampling.weights",
    "grid": "dit_dp.sampling.images",
    "iterate": "dit_dp.sampling.sampler",
    "labels_for": "dit_dp.sampling.sampler",
    "sample_from": "dit_dp.sampling.sampler",
    "save_grid": "dit_dp.sampling.images",
    "save_images": "dit_dp.sampling.images",
    "save_npz": "dit_dp.sampling.images",
    "to_uint8": "dit_dp.sampling.images",
}

__all__ = [
    "GUIDE_CHANNELS",
    "SAMPLERS",
    "VARIANCES",
    "SamplingConfig",
    "evaluating",
    "grid",
    "iterate",
    "labels_for",
    "sample_from",
    "save_grid",
    "save_images",
    "save_npz",
    "to_uint8",
]


__getattr__ = lazily(__name__, _LAZY)
