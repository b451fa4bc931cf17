"""The representation autoencoder (Zheng et al., arXiv 2510.11690): diffusers' `AutoencoderRAE`, frozen.

Shapes: N images, C = 768 latent channels, h = w = 16 positions of DINOv2-with-registers-B at 224 pixels.

The encoder is transformers' `Dinov2WithRegistersModel`, whose last features pass a layer norm without weights; class
and register tokens are left out. The decoder is a ViT-MAE decoder with a learned class token. Both are diffusers', but
for the decoder's positions: at other grids than 16 x 16, diffusers 0.42 has others than the decoders were trained with.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.frontends.checkpoint import load_autoencoder
from dit_dp.frontends.frontend import Frontend, digest_of
from dit_dp.frontends.statistics import VARIANCE_EPS, load_statistics
from dit_dp.models.embedders import sincos_positions

_DIFFUSERS_EPS = 1e-5
"""What diffusers adds to the standard deviation that it divides by."""


_RENAMES = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}
"""What transformers 5 calls the parts of its attention anew: those of checkpoints that are older, and of its own."""


class RAEFrontend(Frontend):
    """`AutoencoderRAE`: images of any size are brought to the encoder's (224 px, bicubic) and by its mean and std.

    Latents are normalised, (z - mean) / sqrt(var + 1e-5), by statistics of **public** data alone, since what is
    trained on private latents would otherwise hold numbers of the private data that nobody charged for: by those that
    the checkpoint was published with, by a file's, or not at all.

    Args:
        source: A folder with ``config.json``, as `AutoencoderRAE.save_pretrained` writes it, or a hub name.
        subfolder: Of the checkpoint in the source.
        statistics: A safetensors file with `mean` and `var`, each (C,), (C, 1, 1) or (C, h, w), of public data or
            charged for by `fit_statistics`; ``none``: do not normalise; `None`: the checkpoint's.

    Attributes:
        statistics: How they are called in `settings`: ``checkpoint``, ``none``, or a file's hash.

    Raises:
        UsageError: What cannot be loaded completely, transformers missing, an encoder that is no DINOv2, statistics
            missing or of another shape.
    """

    name = "rae"

    def __init__(
        self, source: str | Path, *, subfolder: str | None = None, statistics: str | Path | None = None
    ) -> None:
        _require_transformers()
        module, config = load_autoencoder("AutoencoderRAE", source, subfolder, _RENAMES)
        super().__init__(module)
        if config["encoder_type"] != "dinov2" or not config["reshape_to_2d"]:
            fix = "other encoders are untested here"
            raise UsageError.for_value("encoder_type", config["encoder_type"], "dinov2, with latents in a grid", fix)
        self.image_channels: int = config["num_channels"]
        self.latent_channels: int = config["encoder_hidden_size"]
        self._side: int = config["encoder_input_size"] // config["encoder_patch_size"]
        self._decoded: int = self._side * config["patch_size"]
        self._scaling_factor = float(config["scaling_factor"])
        self._input_size: int = config["encoder_input_size"]
        # diffusers stretches the decoder's positions over 16 whatever the grid; a ViT-MAE decoder counts them.
        positions = sincos_positions(config["decoder_hidden_size"], self._side)  # (1, h w, D)
        self._module.decoder.decoder_pos_embed = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        self.statistics = self._normalise_by(statistics, config, str(source))

    def settings(self) -> dict[str, str]:
        """Return the encoder's size and what latents are normalised by; the checkpoint's statistics are weights."""
        return {
            "input_size": str(self._input_size),
            "scaling_factor": repr(self._scaling_factor),
            "statistics": self.statistics,
        }

    def latent_size(self, image_size: int) -> int:
        """Return h, whatever the size of the images, which are brought to the encoder's."""
        validate.integer("image_size", image_size)
        return self._side

    def image_size(self, latent_size: int) -> int:
        """Return the decoder's size, or raise `UsageError` for another latent size than the encoder's."""
        if latent_size != self._side:
            raise UsageError.for_value("latent_size", latent_size, str(self._side), "what the encoder makes")
        return self._decoded

    def _normalise_by(self, statistics: str | Path | None, config: dict[str, Any], source: str) -> str:
        """Put statistics in their place; return how they are called in `settings`."""
        if statistics is None:
            if config["latents_mean"] is None or config["latents_std"] is None:
                fix = "fit_statistics makes such a file"
                accepted = f"a safetensors file with mean and var of public data, or 'none' ({source} holds none)"
                raise UsageError.for_value("statistics", None, accepted, fix)
            return "checkpoint"
        module = self._module
        if str(statistics) == "none":
            mean, std = torch.zeros(1), torch.ones(1)
        else:
            found = load_statistics(statistics).fitting(self.latent_channels, self._side)
            self.spent = found.mechanism
            mean, std = found.mean, (found.var + VARIANCE_EPS).sqrt()
        module._latents_mean, module._latents_std = mean, std - _DIFFUSERS_EPS
        if str(statistics) == "none":
            return "none"
        return digest_of({"mean": mean, "std": std})

    def _encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is not None:
            raise UsageError.for_value("generator", "a generator", "None", "a RAE has no posterior to draw from")
        latents: Tensor = self._module.encode(x / 2 + 0.5).latent  # pixels of [0, 1]
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self._module.decode(latents).sample
        return images * 2 - 1


def _require_transformers() -> None:
    """Raise `UsageError` if transformers, which the encoder is of, cannot be imported."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"rae: transformers cannot be imported ({cause}); pip install 'dit-dp[rae]'") from error
