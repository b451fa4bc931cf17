"""Images to train and measure on, as tensors, one by one or in sets."""

from dit_dp.data.bundled import digits, mnist, synthetic
from dit_dp.data.folder import ImageFolder, image_folder
from dit_dp.data.images import Examples, Images, ImageSet, split
from dit_dp.data.sets import ImageSets, sets_of

__all__ = [
    "Examples",
    "ImageFolder",
    "ImageSet",
    "ImageSets",
    "Images",
    "digits",
    "image_folder",
    "mnist",
    "sets_of",
    "split",
    "synthetic",
]
