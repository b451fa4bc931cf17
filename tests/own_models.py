"""Callables as users write them, right and wrong: ``--model tests.own_models:fixed``."""

import sys

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn

Own = tuple[nn.Module, LossFn, Batch]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["target"]).square().flatten(1).mean(1)  # type: ignore[call-overload]


def rows(count: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 8, 64), "target": torch.randn(count, 8, 32)}


def net(*extra: nn.Module) -> nn.Module:
    sys.stdout.write("said by the user's code\n")
    return nn.Sequential(
        nn.Linear(64, 256), *extra, nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 32)
    )


def fixed() -> Own:
    return net(), loss_fn, rows(5)


class Made(nn.Module):
    """Makes its batches, a tuple; keeps a buffer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.register_buffer("scale", torch.full((64,), 2.0))
        self.positions = nn.Parameter(torch.randn(8, 64))
        self.net = net()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x * self.scale + self.positions + self.embed(label)[:, None])  # type: ignore[no-any-return]

    def make_batch(self, num_examples: int) -> tuple[LossFn, Batch]:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            x, label, target = batch
            return (model(x, label) - target).square().flatten(1).mean(1)  # type: ignore[no-any-return]

        label = torch.randint(0, 10, (num_examples,))
        return loss, (torch.randn(num_examples, 8, 64), label, torch.randn(num_examples, 8, 32))


class Condition(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.detach().abs().max().item()


class NonZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.nonzero().shape[0]


class SecretItem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * float(gradients[0].numel() > 0) * (1.0 if gradients[0].isfinite().all() else 0.0)


class InBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SecretItem.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@torch.library.custom_op("own_models::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_autograd(lambda ctx, gradient: 2 * gradient)


class CustomOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x)


def condition() -> Own:
    return net(Condition()), loss_fn, rows(4)


def item() -> Own:
    return net(Item()), loss_fn, rows(4)


def nonzero() -> Own:
    return net(NonZero()), loss_fn, rows(4)


def in_backward() -> Own:
    return net(InBackward()), loss_fn, rows(4)


def custom_operator() -> Own:
    return net(CustomOperator()), loss_fn, rows(4)


def item_while_building() -> Own:
    return net(nn.Dropout(torch.linspace(0, 0.1, 3)[1].item())), loss_fn, rows(4)


def broken() -> Own:
    raise RuntimeError("no\ndata")


def too_large() -> Own:
    return nn.Linear(2**17, 2**17), loss_fn, rows(4)


def column() -> Own:
    return net(), lambda model, batch: loss_fn(model, batch)[:, None], rows(4)


def mean_loss() -> Own:
    return net(), lambda model, batch: loss_fn(model, batch).mean(), rows(4)


def lists() -> object:
    return net(), loss_fn, {"x": [1.0], "target": [2.0]}


def ragged() -> Own:
    return net(), loss_fn, {"x": torch.randn(4, 8, 64), "target": torch.randn(3, 8, 32)}


def empty() -> Own:
    return net(), loss_fn, rows(0)


class Stingy(Made):
    def make_batch(self, num_examples: int) -> tuple[LossFn, Batch]:
        return super().make_batch(2)


class Unprepared(Made):
    def make_batch(self, num_examples: int) -> tuple[LossFn, Batch]:
        raise KeyError("no such file")


def frozen() -> Own:
    return net().requires_grad_(False), loss_fn, rows(4)
