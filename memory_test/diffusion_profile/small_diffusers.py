"""Save a small random model of diffusers' DiT to the folder given: width 384, 6 blocks, 32 x 32 latents of 4 channels.

The workload `diffusers` takes a hub name or a folder; sweeps that run anywhere take this one.
"""

import sys
from pathlib import Path

import torch

from memory_test.core.store import check_writable


def main(folder: Path) -> None:
    """Save it, as diffusers does."""
    from diffusers import DiTTransformer2DModel

    check_writable(folder / "config.json")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        num_layers=6,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
