"""What a front-end is to those who train on latents: a frozen function from images to latents and back.

Shapes: N images, H = W pixels, C latent channels, h = w latent positions.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.privacy import Mechanism

log = logging.getLogger(__name__)

_BEYOND = 1e-3
"""How far beyond [-1, 1] a pixel may be: rounding, not another scale."""


class Frontend(ABC):
    """A frozen encoder and decoder.

    It is no `nn.Module`, so that a model that holds one has not got its parameters: no optimizer, engine, checkpoint
    or average of weights ever sees them. The network is in evaluation mode and float32, its parameters take no
    gradient, and nothing that is computed here is recorded for a backward pass.

    **Guarantees**: a latent depends on its image and on the weights alone, so that whoever trains on latents has the
    units of whoever trains on images. The weights have to be public: what a front-end learned from private data, or
    was normalised by (`spent`), is no part of what a training's own accounting covers.

    Args:
        module: The network, with its weights, float32.

    Attributes:
        name: As in `FRONTENDS`.
        image_channels: Of the images.
        latent_channels: C.
        spent: What its statistics cost in privacy, to be composed with what the training does; `None`: nothing.
    """

    name: ClassVar[str]
    image_channels: int
    latent_channels: int
    spent: Mechanism | None = None

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module.eval().requires_grad_(False)
        self._device = torch.device("cpu")

    def to(self, device: str | torch.device) -> Self:
        """Move to a device; returns itself."""
        self._device = torch.device(device)
        self._module.to(self._device)
        return self

    @property
    def module(self) -> nn.Module:
        """The network, frozen."""
        network: nn.Module = self._module
        return network

    @property
    def device(self) -> torch.device:
        """Where it runs, and where it returns its results."""
        return self._device

    @cached_property
    def weights(self) -> str:
        """SHA-256 of all weights and buffers by name, dtype and shape."""
        return digest_of(self._module.state_dict())

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """Return what besides the weights decides on a latent."""

    @abstractmethod
    def latent_size(self, image_size: int) -> int:
        """Return h = w of the latents of images of a size, or raise `UsageError` if it does not fit."""

    @abstractmethod
    def image_size(self, latent_size: int) -> int:
        """Return H = W of the images that latents of a size are decoded to, or raise `UsageError`."""

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents of images, at the scale that models train at.

        Args:
            x: Images (N, 3, H, W) in [-1, 1]; N may be 0.
            generator: Of a VAE: draw from the posterior with it. `None`: take the mean, which is deterministic.

        Returns:
            (N, C, h, w) float32, on the front-end's device.

        Raises:
            UsageError: Not images of this form: other channels or sizes, or numbers beyond [-1, 1] (latents).
        """
        if x.ndim != 4 or x.shape[1] != self.image_channels or x.shape[2] != x.shape[3]:
            accepted = f"square images (N, {self.image_channels}, H, H)"
            fix = f"a front-end takes pixels; these look like latents of {x.shape[1]} channels" if x.ndim == 4 else None
            raise UsageError.for_value("images", tuple(x.shape), accepted, fix)
        side = self.latent_size(x.shape[-1])
        if not len(x):
            return torch.empty(0, self.latent_channels, side, side, device=self._device)
        largest = float(x.detach().abs().max())
        if not largest <= 1 + _BEYOND:
            fix = "a front-end takes pixels, not latents or 0 to 255"
            raise UsageError.for_value("images", f"a value of size {largest:.4g}", "numbers from -1 to 1", fix)
        with torch.no_grad():
            latents = self._encode(x.to(self._device, torch.float32), generator)
        if latents.shape[1:] != (self.latent_channels, side, side):
            raise AssertionError(f"latents {tuple(latents.shape)} of a {self.name}: expected side {side}")
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents.

        Args:
            latents: (N, C, h, w) at the scale of `encode`.

        Returns:
            (N, 3, H, W) float32, about [-1, 1] and not cut to it, on the front-end's device.

        Raises:
            UsageError: Other channels or sizes.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or latents.shape[2] != latents.shape[3]:
            accepted = f"square latents (N, {self.latent_channels}, h, h)"
            raise UsageError.for_value("latents", tuple(latents.shape), accepted)
        side = self.image_size(latents.shape[-1])
        if not len(latents):
            return torch.empty(0, self.image_channels, side, side, device=self._device)
        with torch.no_grad():
            return self._decode(latents.to(self._device, torch.float32))

    @abstractmethod
    def _encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the latents of checked images."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Return the images of checked latents."""


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, dtype, shape and content, whatever order they are in."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_image_size(image_size: int, divisor: int) -> None:
    """Raise `UsageError` unless a size is one, and a multiple of what a latent position covers."""
    validate.integer("image_size", image_size)
    validate.divisible("image_size", image_size, divisor, f"a latent position covers {divisor} pixels")
