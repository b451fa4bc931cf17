"""Random inputs and output gradients of a linear layer, and their per-example gradient norms in float64."""

import torch
from torch import Tensor


def operands(
    examples: int, positions: int, width: int, out_width: int, dtype: torch.dtype, seed: int, strided: bool
) -> tuple[Tensor, Tensor]:
    """Return a (N, T, d) and g (N, T, p); `strided`: transposed views, as of a convolution, of a larger batch.

    All are in [0.5, 1.5], so that nothing cancels and a norm's error is relative to it: a few roundings.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(features: int) -> Tensor:
        if not strided:
            return (torch.rand(examples, positions, features, generator=generator) + 0.5).to(dtype)
        whole = (torch.rand(2 * examples, features, positions + 3, generator=generator) + 0.5).to(dtype)
        return whole[::2, :, 3:].transpose(1, 2)

    return draw(width), draw(out_width)


def float64_squares(a: Tensor, g: Tensor) -> Tensor:
    """Return ``|g_i^T a_i|_F^2``, (N,)."""
    return torch.bmm(g.double().transpose(1, 2), a.double()).square().sum((1, 2))
