"""One rule per layer type: its forward, its gradients, and what one call contributes to per-example norms.

Shapes: N examples, T positions (tokens, patches), d inputs, p outputs, D features.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp.clipping.contributions import Contribution, Direct, Outer, Rows, float32, sum_float32


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
            Direct(sum_float32(g, 1)) if trains_bias else None,
        )


class MatmulRule(LinearRule):
    """``x @ W`` with a (d, p) matrix: a linear layer whose weight is stored transposed."""

    name = "matmul"

    def compute(self, module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``x W``."""
        assert weight is not None
        return x @ weight

    def input_gradient(self, module: Any, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """Return ``g W^T``."""
        assert weight is not None
        return g @ weight.T

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> tuple[Contribution | None, Contribution | None]:
        """Swap the linear layer's operands: the gradient is ``x^T g``."""
        return super().contributions(module, g, x)


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
        return weight, Direct(sum_float32(flat, 2)) if trains_bias else None


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
    def _reduced(module: Any, value: Tensor) -> Tensor:
        """Sum over all dimensions but the examples' and the parameter's."""
        if isinstance(module, nn.GroupNorm):
            kept = {1}
        else:
            kept = set(range(value.dim() - len(module.normalized_shape), value.dim()))
        dims = [dim for dim in range(1, value.dim()) if dim not in kept]
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
            Direct(self._reduced(module, g * x)) if weight is not None and weight.requires_grad else None,
            Direct(self._reduced(module, g)) if bias is not None and bias.requires_grad else None,
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
