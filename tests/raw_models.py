"""Small models whose own forward reads raw parameters, for `tests.models.KINDS`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KINDS = ("positions", "prefix", "scales", "adapters", "raw layers", "keywords")
"""Their names in `tests.models`."""


def _raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


class Positions(nn.Module):
    """Positions for all examples, one table for rows and one for columns of a grid, and a norm after them."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = _raw(1, 6, 6)
        self.rows = _raw(2, 1, 6)
        self.columns = _raw(3, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.rows + self.columns).flatten(0, 1)  # (6, 6), before it meets an example
        return self.out(self.norm(x + self.positions + grid)).mean(1)


class Prefix(nn.Module):
    """A class token and registers in front of the tokens, a mask token in the place of some."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = _raw(1, 1, 6)
        self.registers = _raw(2, 6)
        self.mask_token = _raw(6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x.sum(-1, keepdim=True) > 0, x, self.mask_token)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        registers = self.registers[None].repeat(len(x), 1, 1)
        x = torch.cat([cls, registers, x], dim=1)
        return self.out(torch.tanh(self.mix(x)).mean(1) + x[:, 0])


class Scales(nn.Module):
    """A scale per channel that is used twice, a temperature, and one that stays positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.gamma = _raw(6)
        self.temperature = _raw()
        self.raw_width = _raw(5)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.first(x)
        width = F.softplus(self.raw_width).unsqueeze(-1)
        ramp = torch.linspace(0.5, 1.5, 6, dtype=x.dtype)
        x = x + self.gamma * ramp * torch.tanh(x / width)
        return self.out(x).mean(1) * self.temperature.exp()


class Tail(nn.Module):
    """A positive scale."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = _raw(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.softplus(self.shared)


class Checkpointed(nn.Module):
    """A block that runs twice under activation checkpointing; a parameter that two modules hold and read."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Linear(6, 6)
        self.block = Scales()
        self.tail = Tail()
        self.shared = self.tail.shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        y = y + checkpoint(self.block, 2 * x, use_reentrant=self.reentrant)
        return checkpoint(self.tail, y, use_reentrant=self.reentrant) + self.shared


class LoRALinear(nn.Module):
    """A frozen linear and two trainable ones of rank 2 beside it, as peft builds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)
        self.scaling = 0.7

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_b(self.lora_a(x))


class RawLoRALinear(nn.Linear):
    """A linear whose low-rank part are raw matrices, as loralib builds it."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width)
        self.weight.requires_grad_(False)
        self.lora_a = _raw(2, width)
        self.lora_b = _raw(out_width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 0.7 * (x @ self.lora_a.T @ self.lora_b.T)


class Adapters(nn.Module):
    """Both kinds of adapter, and one merged into its weight before use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LoRALinear(nn.Linear(6, 6))
        self.second = RawLoRALinear(6, 6)
        self.register_buffer("base", torch.randn(6, 3))
        self.down = _raw(6, 2)
        self.up = _raw(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return (x @ (self.base + self.down @ self.up)).mean(1)


class RawLayers(nn.Module):
    """Functional layers on raw parameters: linear, embedding, norms, a product, a learned query and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _raw(7, 6)
        self.qkv_weight = _raw(12, 6)
        self.qkv_bias = _raw(12)
        self.scale, self.shift, self.rms = _raw(6), _raw(6), _raw(6)
        self.query = _raw(1, 2, 6)
        self.bias = _raw(2, 5)
        self.head = _raw(6, 3)

    def forward(self, words: Tensor, label: Tensor) -> Tensor:
        x = F.embedding(words, self.table) + self.table[label][:, None]
        x = F.layer_norm(x, (6,), self.scale, self.shift)
        k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), k, v, attn_mask=self.bias)
        return F.rms_norm(mixed, (6,), self.rms).mean(1) @ self.head


class KeywordsOnly(nn.Module):
    """A forward of several inputs by keyword, which calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.RMSNorm(6)
        self.gate = _raw(6)

    def forward(self, x: Tensor, *, weight: Tensor) -> Tensor:
        hidden = self.norm(x=self.linear(input=x))
        return torch.add(hidden, other=self.gate * weight[:, None]).mean(1)


class Called(nn.Module):
    """Calls a model by position and keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = KeywordsOnly()

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.inner(x, weight=weight)
