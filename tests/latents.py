"""Tiny autoencoders, saved as the libraries save them, and images for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dit_dp.data import ImageSet
from dit_dp.frontends import Frontend
from dit_dp.frontends.frontend import check_image_size

VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
RAE_CONFIG: dict[str, Any] = {
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 2,
    "encoder_input_size": 28,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "patch_size": 4,
}
"""A grid of 2 x 2 positions, decoded to 8 pixels."""


def save_vae(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random VAE that halves the side, as diffusers does."""
    import diffusers

    torch.manual_seed(seed)
    diffusers.AutoencoderKL(**{**VAE_CONFIG, **changes}).save_pretrained(folder)
    return folder


def save_rae(folder: Path, **changes: Any) -> Path:
    """Save a random representation autoencoder whose class token is a token that its embedding can make."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderRAE(**{**RAE_CONFIG, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        model.decoder.trainable_cls_token.copy_(model.decoder.decoder_embed(first_token()))
    model.save_pretrained(folder)
    return folder


def first_token() -> Tensor:
    """Return what a ViT-MAE decoder has to be given for a class token, so that it sees the learned one."""
    return torch.linspace(-1, 1, RAE_CONFIG["encoder_hidden_size"]).view(1, 1, -1)


def pixels(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Return images in [-1, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image_set(count: int, size: int = 8, seed: int = 0) -> ImageSet:
    """Return images in [-1, 1] of three classes."""
    labels = torch.arange(count) % 3
    return ImageSet(x=pixels(count, size, seed), labels=labels, num_classes=3, channels=3, size=size)


def write_folder(root: Path, images: ImageSet) -> Path:
    """Write images as an ImageNet-style folder."""
    for number, (x, label) in enumerate(zip(images.x, images.labels.tolist(), strict=True)):
        place = root / f"class-{label}"
        place.mkdir(parents=True, exist_ok=True)
        values = ((x + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        Image.fromarray(values).save(place / f"{number:03d}.png")
    return root


class Halving(Frontend):
    """A front-end without a library: a 2 x 2 convolution to 4 channels, and what it is undone by."""

    name = "halving"
    image_channels = 3
    latent_channels = 4

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.ModuleDict({"down": nn.Conv2d(3, 4, 2, 2), "up": nn.ConvTranspose2d(4, 3, 2, 2)}))
        self.scale, self.calls = scale, 0

    def settings(self) -> dict[str, str]:
        return {"scale": repr(self.scale)}

    def latent_size(self, image_size: int) -> int:
        check_image_size(image_size, 2)
        return image_size // 2

    def image_size(self, latent_size: int) -> int:
        return latent_size * 2

    def _encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        self.calls += 1
        latents: Tensor = self._module["down"](x) * self.scale
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self._module["up"](latents / self.scale)
        return images
