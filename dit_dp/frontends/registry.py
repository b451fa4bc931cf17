"""Which front-ends there are, by name. No torch."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from dit_dp import validate
from dit_dp.errors import UsageError

if TYPE_CHECKING:
    from dit_dp.frontends.frontend import Frontend

FRONTENDS = {
    "vae": "dit_dp.frontends.vae:VAEFrontend",
    "rae": "dit_dp.frontends.rae:RAEFrontend",
}
"""Name to class: ``vae`` is diffusers' `AutoencoderKL`, ``rae`` its `AutoencoderRAE`."""


def make_frontend(
    name: str,
    source: str | Path,
    *,
    subfolder: str | None = None,
    statistics: str | Path | None = None,
    device: str = "cpu",
) -> "Frontend":
    """Return a frozen front-end with the weights of a local folder or of the hub; never with any others.

    Args:
        name: ``vae`` or ``rae``.
        source: A local folder, from which alone is read then; or a hub name (``stabilityai/sd-vae-ft-ema``,
            ``nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08``).
        subfolder: Folder of a hub repository with the weights (``vae`` of a pipeline). In a local folder ``vae`` is
            looked for.
        statistics: Of ``rae`` alone: what latents are normalised by. A safetensors file of public data (`mean` and
            `var`); ``none``; `None`: the checkpoint's.
        device: Where to run.

    Raises:
        UsageError: Another name, no such folder or repository, weights that do not fit, a package that is missing,
            statistics that are none.
    """
    validate.one_of("frontend", name, FRONTENDS)
    options: dict[str, str | Path | None] = {"subfolder": subfolder}
    if name == "rae":
        options["statistics"] = statistics
    elif statistics is not None:
        raise UsageError.for_value("statistics", str(statistics), "None", "a VAE's latents are scaled, not normalised")
    module, _, cls = FRONTENDS[name].partition(":")
    frontend: Frontend = getattr(importlib.import_module(module), cls)(source, **options)
    return frontend.to(device)
