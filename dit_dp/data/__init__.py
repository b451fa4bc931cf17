"""Images to train and measure on, as tensors."""

from dit_dp.data.bundled import ImageSet, digits, synthetic

__all__ = ["ImageSet", "digits", "synthetic"]
