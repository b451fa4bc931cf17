"""The VAE of latent diffusion: diffusers' `AutoencoderKL` (Rombach et al., arXiv 2112.10752), frozen.

Shapes: N images, H = W pixels, C latent channels, h = w = H / 8 positions (2 per level but the first).
"""

from pathlib import Path

import torch
from torch import Tensor

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.frontends.checkpoint import load_autoencoder
from dit_dp.frontends.frontend import Frontend, check_image_size


class VAEFrontend(Frontend):
    """`AutoencoderKL` with the scale of its checkpoint: z = (posterior - shift_factor) scaling_factor.

    `encode` takes the posterior's mean unless it is given a generator to draw from the posterior with. The mean is
    deterministic, so it is what a cache holds: a cached draw would be one draw for ever. The reference DiT's training
    draws anew whenever it sees an image, which a cache cannot.

    Args:
        source: A folder with ``config.json`` or ``vae/config.json``, or a hub name.
        subfolder: Of the checkpoint in the source.

    Raises:
        UsageError: What cannot be loaded completely, or latents whose scale is another than the above.
    """

    name = "vae"

    def __init__(self, source: str | Path, *, subfolder: str | None = None) -> None:
        module, config = load_autoencoder("AutoencoderKL", source, subfolder)
        super().__init__(module)
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise UsageError(f"frontend: {str(source)!r} normalises by latents_mean; accepted: scaling_factor alone")
        self.image_channels: int = config["in_channels"]
        self.latent_channels: int = config["latent_channels"]
        self.scaling_factor = float(config["scaling_factor"])
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        self._factor: int = 2 ** (len(config["block_out_channels"]) - 1)

    def settings(self) -> dict[str, str]:
        """Return the scale and what is taken of the posterior in a cache."""
        return {
            "posterior": "mean",
            "scaling_factor": repr(self.scaling_factor),
            "shift_factor": repr(self.shift_factor),
        }

    def latent_size(self, image_size: int) -> int:
        """Return H / 8, or raise `UsageError` if that is no whole number."""
        check_image_size(image_size, self._factor)
        return image_size // self._factor

    def image_size(self, latent_size: int) -> int:
        """Return 8 h."""
        validate.integer("latent_size", latent_size)
        return latent_size * self._factor

    def _encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        posterior = self._module.encode(x).latent_dist
        latents: Tensor = posterior.mean if generator is None else posterior.sample(generator)
        return (latents - self.shift_factor) * self.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self._module.decode(latents / self.scaling_factor + self.shift_factor).sample
        return images
