"""One rule per layer type: its forward, its gradients, and what one call contributes to per-example norms.

Shapes: N examples, T positions (tokens, patches), d inputs, p outputs, D features.

A layer's weight gradient for example i is a sum over positions and over every call of the layer. A call adds
one contribution per parameter; contributions to one parameter, also through tied weights, are joined before the
norm is taken, so that cross terms count.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCRATCH_BYTES = 64 * 2**20
"""Examples are taken together as long as their Gram matrices or gradients stay below this."""


def float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are: norms are never accumulated below it."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices, accumulated and returned in float32 where they are half precision.

    A sum over examples rounded to bf16 would move by more than C when one example is removed, since the rounding
    error grows with the sum and not with the example.
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# --- contributions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outer:
    """Per-example gradient ``g_i^T a_i`` of a weight seen as a (p, d) matrix; a (N, T, d), g (N, T, p)."""

    a: Tensor
    g: Tensor

    def gradients(self, shape: torch.Size) -> Tensor:
        """Return the per-example gradients, (N, *shape)."""
        return torch.bmm(float32(self.g).transpose(1, 2), float32(self.a)).view(-1, *shape)

    def squared_norms(self) -> Tensor:
        """Return ``|g_i^T a_i|_F^2``, (N,), by the rule that needs fewer operations.

        ghost (Li et al. 2021, arXiv 2110.05679): ``sum((a_i a_i^T) * (g_i g_i^T))``, T^2 (d + p) multiply-adds;
        direct: the product itself, T d p; at T = 1: ``|a_i|^2 |g_i|^2``.
        """
        rows, positions, width = self.a.shape
        rule = self.rule(positions, width, self.g.shape[2])
        if rule == "outer product":
            a, g = float32(self.a), float32(self.g)
            return a.square().sum((1, 2)) * g.square().sum((1, 2))
        per_example = (2 * positions**2 if rule == "ghost" else width * self.g.shape[2]) * 4
        together = max(1, SCRATCH_BYTES // per_example)
        parts = []
        for start in range(0, rows, together):
            a = float32(self.a[start : start + together])
            g = float32(self.g[start : start + together])
            if rule == "ghost":
                gram = torch.bmm(a, a.transpose(1, 2)).mul_(torch.bmm(g, g.transpose(1, 2)))
                parts.append(gram.sum((1, 2)))
            else:
                parts.append(torch.bmm(g.transpose(1, 2), a).square_().sum((1, 2)))
        return torch.cat(parts).clamp(min=0)  # a Gram sum of a zero gradient can round below zero

    @staticmethod
    def rule(positions: int, width: int, out_width: int) -> str:
        """Return the rule for these shapes."""
        if positions == 1:
            return "outer product"
        return "ghost" if positions * (width + out_width) < width * out_width else "direct"


@dataclass(frozen=True)
class Rows:
    """Per-example gradient of an embedding table: rows g (N, T, D) added at indices (N, T)."""

    index: Tensor
    g: Tensor

    def gradients(self, shape: torch.Size) -> Tensor:
        """Return the per-example gradients, (N, *shape)."""
        g = float32(self.g)
        out = g.new_zeros(g.shape[0], *shape)
        return out.scatter_add_(1, self.index[..., None].expand_as(g), g)

    def squared_norms(self) -> Tensor:
        """Return squared norms, (N,): products of rows that fall on the same index, without the table."""
        g = float32(self.g)
        if g.shape[1] == 1:
            return g.square().sum((1, 2))
        same = self.index[:, :, None] == self.index[:, None, :]
        return (torch.bmm(g, g.transpose(1, 2)) * same).sum((1, 2)).clamp(min=0)


@dataclass(frozen=True)
class Direct:
    """Per-example gradients themselves, (N, *shape): biases and scales, which are small."""

    value: Tensor

    def gradients(self, shape: torch.Size) -> Tensor:
        """Return the per-example gradients, (N, *shape)."""
        return float32(self.value).view(-1, *shape)

    def squared_norms(self) -> Tensor:
        """Return squared norms, (N,)."""
        return float32(self.value).flatten(1).square().sum(1)


Contribution = Outer | Rows | Direct


def joined_squared_norms(contributions: list[Contribution], shape: torch.Size) -> Tensor:
    """Return the squared norm of the sum of contributions to one parameter, (N,).

    Several `Outer` of one weight are one `Outer` over the union of their positions; other mixtures (an
    embedding tied to a linear) are added up as gradients.
    """
    if len(contributions) == 1:
        return contributions[0].squared_norms()
    outers = [c for c in contributions if isinstance(c, Outer)]
    if len(outers) == len(contributions):
        return Outer(torch.cat([c.a for c in outers], 1), torch.cat([c.g for c in outers], 1)).squared_norms()
    total = contributions[0].gradients(shape)
    for contribution in contributions[1:]:
        total = total + contribution.gradients(shape)
    return Direct(total).squared_norms()


# --- rules --------------------------------------------------------------------------------------------------


class Rule(ABC):
    """What the engine needs to know about a layer type. Parameters come as (weight, bias or None)."""

    name: str

    def check(self, module: Any) -> str | None:
        """Return why this module cannot be handled, or `None`."""
        return None

    def prepare(self, module: Any, x: Tensor) -> Tensor:
        """Do the part of the forward that has no parameters, under autograd."""
        return x

    @abstractmethod
    def compute(self, module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the output."""

    @abstractmethod
    def input_gradient(self, module: Any, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor | None:
        """Return the gradient of the input from that of the output."""

    @abstractmethod
    def contributions(self, module: Any, x: Tensor, g: Tensor) -> tuple[Contribution | None, Contribution | None]:
        """Return what this call adds to the per-example gradients of (weight, bias), if they train."""

    @abstractmethod
    def parameter_gradients(
        self, module: Any, x: Tensor, weight: Tensor | None, g: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the batch's gradients of (weight, bias) where needed, summed in float32 or better."""


class LinearRule(Rule):
    """``nn.Linear`` with any leading dimensions, the first of which is examples."""

    name = "linear"

    def compute(self, module: nn.Linear, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + b``."""
        assert weight is not None
        return F.linear(x, weight, bias)

    def input_gradient(self, module: nn.Linear, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """Return ``g W``."""
        assert weight is not None
        return g @ weight

    def contributions(self, module: nn.Linear, x: Tensor, g: Tensor) -> tuple[Contribution | None, Contribution | None]:
        """Flatten what lies between examples and features to positions."""
        rows = x.shape[0]
        a, g = x.reshape(rows, -1, x.shape[-1]), g.reshape(rows, -1, g.shape[-1])
        trains_bias = module.bias is not None and module.bias.requires_grad
        return (
            Outer(a, g) if module.weight.requires_grad else None,
            Direct(float32(g).sum(1)) if trains_bias else None,
        )

    def parameter_gradients(
        self, module: nn.Linear, x: Tensor, weight: Tensor | None, g: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ``g^T x`` and ``sum g`` over everything but features."""
        g2 = g.reshape(-1, g.shape[-1])
        grad_weight = matmul_float32(g2.T, x.reshape(-1, x.shape[-1])) if needed[0] else None
        return grad_weight, float32(g2).sum(0) if needed[1] else None


class Conv2dRule(Rule):
    """``nn.Conv2d`` with zero padding, groups included; patch embeddings are the case kernel = stride."""

    name = "conv2d"

    def check(self, module: nn.Conv2d) -> str | None:
        """Accept zero padding that is the same on both sides."""
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}; use 'zeros', or pad before the layer"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "padding='same' with an even kernel pads one side more; pad before the layer"
        return None

    @staticmethod
    def _padding(module: nn.Conv2d) -> tuple[int, int]:
        if module.padding == "same":
            return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))  # type: ignore[return-value]
        return (0, 0) if isinstance(module.padding, str) else module.padding  # type: ignore[return-value]

    def compute(self, module: nn.Conv2d, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the convolution."""
        assert weight is not None
        return F.conv2d(x, weight, bias, module.stride, self._padding(module), module.dilation, module.groups)

    def _backward(
        self, module: nn.Conv2d, x: Tensor, weight: Tensor, g: Tensor, mask: list[bool]
    ) -> list[Tensor | None]:
        out: list[Tensor | None] = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            [weight.shape[0]],
            module.stride,
            self._padding(module),
            module.dilation,
            False,
            [0, 0],
            module.groups,
            mask,
        )
        return out

    def input_gradient(self, module: nn.Conv2d, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor | None:
        """Return the transposed convolution."""
        assert weight is not None
        return self._backward(module, x, weight, g, [True, False, False])[0]

    def contributions(self, module: nn.Conv2d, x: Tensor, g: Tensor) -> tuple[Contribution | None, Contribution | None]:
        """Unfold to a linear layer over output positions: a (N, L, d k k / groups), g (N, L, p)."""
        weight: Contribution | None = None
        flat = g.flatten(2)  # (N, p, L)
        if module.weight.requires_grad:
            a = F.unfold(
                x,
                module.kernel_size,
                dilation=module.dilation,
                padding=self._padding(module),
                stride=module.stride,
            )  # (N, d k k, L)
            if module.groups == 1:
                weight = Outer(a.transpose(1, 2), flat.transpose(1, 2))
            else:
                split = (x.shape[0], module.groups, -1, a.shape[-1])
                per_group = torch.einsum("ngpl,ngdl->ngpd", float32(flat).reshape(split), float32(a).reshape(split))
                weight = Direct(per_group.reshape(x.shape[0], *module.weight.shape))
        trains_bias = module.bias is not None and module.bias.requires_grad
        return weight, Direct(float32(flat).sum(2)) if trains_bias else None

    def parameter_gradients(
        self, module: nn.Conv2d, x: Tensor, weight: Tensor | None, g: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the convolution's own gradients."""
        assert weight is not None
        _, grad_weight, grad_bias = self._backward(module, float32(x), float32(weight), float32(g), [False, *needed])
        return grad_weight, grad_bias


class EmbeddingRule(Rule):
    """``nn.Embedding`` with indices (N,) or (N, ...)."""

    name = "embedding"

    def check(self, module: nn.Embedding) -> str | None:
        """Refuse options that couple examples or rewrite the table."""
        if module.max_norm is not None:
            return "max_norm rewrites the table in the forward pass; set max_norm=None"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides by counts over the whole batch; set it to False"
        if module.sparse:
            return "sparse=True; set it to False"
        return None

    def compute(self, module: nn.Embedding, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the rows."""
        assert weight is not None
        return F.embedding(x, weight, module.padding_idx)

    def input_gradient(self, module: nn.Embedding, x: Tensor, weight: Tensor | None, g: Tensor) -> None:
        """Indices have none."""

    @staticmethod
    def _masked(module: nn.Embedding, x: Tensor, g: Tensor) -> Tensor:
        return g if module.padding_idx is None else g * (x != module.padding_idx)[..., None]

    def contributions(
        self, module: nn.Embedding, x: Tensor, g: Tensor
    ) -> tuple[Contribution | None, Contribution | None]:
        """Return the rows of this call."""
        g = self._masked(module, x, g)
        rows = x.shape[0]
        return Rows(x.reshape(rows, -1), g.reshape(rows, -1, g.shape[-1])), None

    def parameter_gradients(
        self, module: nn.Embedding, x: Tensor, weight: Tensor | None, g: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add rows into a zero table."""
        assert weight is not None
        g = self._masked(module, x, g).to(weight.dtype)
        return torch.zeros_like(weight).index_add_(0, x.reshape(-1), g.reshape(-1, g.shape[-1])), None


class ScaleRule(Rule):
    """The affine part of ``LayerNorm``, ``RMSNorm`` and ``GroupNorm``; the normalisation stays autograd's."""

    name = "norm"

    def prepare(self, module: Any, x: Tensor) -> Tensor:
        """Normalise without scale and shift."""
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, eps=module.eps)

    @staticmethod
    def _view(module: Any, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.view(-1, *[1] * (x.dim() - 2)) if isinstance(module, nn.GroupNorm) else parameter

    @staticmethod
    def _reduced(module: Any, value: Tensor, keep_examples: bool) -> Tensor:
        """Sum over all dimensions but the parameter's (and the examples')."""
        if isinstance(module, nn.GroupNorm):
            kept = {1}
        else:
            kept = set(range(value.dim() - len(module.normalized_shape), value.dim()))
        dims = [dim for dim in range(1 if keep_examples else 0, value.dim()) if dim not in kept]
        return value.sum(dims) if dims else value

    def compute(self, module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``x * w + b``, broadcast."""
        out = x if weight is None else x * self._view(module, weight, x)
        return out if bias is None else out + self._view(module, bias, x)

    def input_gradient(self, module: Any, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """Return ``g * w``."""
        return g if weight is None else g * self._view(module, weight, g)

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> tuple[Contribution | None, Contribution | None]:
        """Return the per-example gradients, which are as small as the parameters."""
        weight, bias = module.weight, getattr(module, "bias", None)
        g, x = float32(g), float32(x)
        return (
            Direct(self._reduced(module, g * x, True)) if weight is not None and weight.requires_grad else None,
            Direct(self._reduced(module, g, True)) if bias is not None and bias.requires_grad else None,
        )

    def parameter_gradients(
        self, module: Any, x: Tensor, weight: Tensor | None, g: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the sums over examples."""
        x, g = float32(x), float32(g)
        return (
            self._reduced(module, g * x, False) if needed[0] else None,
            self._reduced(module, g, False) if needed[1] else None,
        )


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv2d: Conv2dRule(),
    nn.Embedding: EmbeddingRule(),
    nn.LayerNorm: ScaleRule(),
    nn.RMSNorm: ScaleRule(),
    nn.GroupNorm: ScaleRule(),
}
"""By layer type. A subclass is covered as long as it keeps its base's forward."""

COUPLED = (nn.modules.batchnorm._BatchNorm,)
"""Layers through which one example changes another's output; no per-example gradient exists."""


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule of a module, or `None` if there is none or it overrides its base's forward."""
    for base, rule in RULES.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            return rule
    return None
