"""Raw parameters: every way of reading them against the float64 loop, and what is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import UnsupportedModelError
from tests import raw_models
from tests.models import Case, groups_of, make_case
from tests.oracle.test_methods import TOLERANCE, median_norm, relative_error

WATCHED = ["ghost", "bookkeeping", "lean", "per_layer"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SIZES = pytest.mark.parametrize("sizes", [(4, 5, 6), (4, 4, 4), (1, 3, 2)], ids=["4-5-6", "4-4-4", "1-3-2"])
"""N, T, D; equal ones, so that no decision hangs on sizes that happen to differ."""


class Reads(nn.Module):
    """A layer, an operation on its output and a raw parameter, a layer."""

    def __init__(self, operation: Callable[..., Tensor], sizes: tuple[int, int, int], shape: str) -> None:
        super().__init__()
        _, tokens, width = sizes
        named = {"N": sizes[0], "T": tokens, "D": width}
        self.operation = operation
        self.embed = nn.Linear(width, width)
        self.raw = nn.Parameter(0.5 + torch.rand([named.get(size) or int(size) for size in shape.split()]))
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.operation(self.raw, torch.tanh(self.embed(x))).flatten(1, -2)).mean(1)


def reads(operation: Callable[..., Tensor], sizes: tuple[int, int, int], shape: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Reads(operation, sizes, shape).to(dtype)
    scale = torch.logspace(-1, 1.5, sizes[0])[:, None]
    batch = (torch.randn(sizes, generator=generator), scale * torch.randn(sizes[0], 3, generator=generator))
    return Case(model, tuple(t.to(dtype) for t in batch), make_case("vectors").loss_fn)


def check(case: Case, method: str, wanted_of: nn.Module | None = None, tolerance: float | None = None) -> None:
    """Compare a method's clipped sum and norms with the oracle's, at a threshold that clips about half."""
    oracle = Case(wanted_of or case.model, case.batch, case.loss_fn)
    threshold = median_norm(oracle)
    groups = groups_of(case.model, method)
    wanted, norms = clipped_sum(oracle.model, case.loss_fn, case.batch, threshold, groups=groups)
    engine = attach(case.model, method, max_grad_norm=threshold)
    got_norms = engine.accumulate(case.loss_fn, case.batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    got = {name: p.grad for name, p in engine.parameters.items() if p.grad is not None}
    tolerance = tolerance or TOLERANCE[next(case.model.parameters()).dtype]
    assert relative_error(got, {name: wanted[name] for name in got}) < tolerance
    assert all(not wanted[name].any() for name in wanted.keys() - got.keys())
    assert got_norms is not None
    torch.testing.assert_close(got_norms.double(), norms, rtol=tolerance, atol=0)
    engine.detach()


def assigned(p: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = p
    return x


def in_place(p: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x *= p
    return x.add_(p, alpha=2)


def written_into_constants(p: Tensor, x: Tensor) -> Tensor:
    table = torch.zeros(x.shape[1:], dtype=x.dtype)
    table[0] = p
    return x + table


def scaled_by_a_written_constant(p: Tensor, x: Tensor) -> Tensor:
    """Examples come into the constant through a view of it: the rows of what is made of it differ."""
    weights = torch.zeros(len(x), 1, 1, dtype=x.dtype)
    weights[:, 0].copy_(x[:, 0, :1].detach())
    return x + p * weights


def half_detached(p: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = p.exp()
    return x * scale * p.detach() + p


def interpolated(p: Tensor, x: Tensor) -> Tensor:
    grown = F.interpolate(p.T[None], size=x.shape[1], mode="linear", align_corners=False)  # (1, D, T)
    return x + grown.transpose(1, 2)


CONSTANTS: dict[tuple[int, ...], Tensor] = {}


def times_a_constant_from_outside(p: Tensor, x: Tensor) -> Tensor:
    """The constant has no owner and, where T = N, the examples' size in front."""
    ramp = CONSTANTS.setdefault(tuple(x.shape[1:]), torch.linspace(0.5, 1.5, x[0].numel()).view(x.shape[1:]))
    return x + p * ramp.to(x.dtype)


OPERATIONS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "add": ("1 T D", lambda p, x: x + p),
    "positions without a batch": ("T D", lambda p, x: p + x),
    "reflected": ("D", lambda p, x: 2 - p - x),
    "twice": ("D", lambda p, x: p * x + p * torch.sin(p * x)),
    "scalar": ("", lambda p, x: x * p),
    "scalar of one": ("1", lambda p, x: x / p),
    "powers": ("D", lambda p, x: x.abs() ** p + p**x),
    "addcmul": ("D", lambda p, x: torch.addcmul(x, p, x, value=0.5)),
    "where": ("D", lambda p, x: torch.where(x > 0, x, p)),
    "compared": ("D", lambda p, x: x * (x > p)),
    "in place": ("D", in_place),
    "assigned": ("D", assigned),
    "assigned a block": ("1 D", lambda p, x: assigned(p.expand(len(x), -1), x)),
    "cat": ("1 1 D", lambda p, x: torch.cat([p.expand(len(x), -1, -1), x], 1)),
    "cat of copies": ("2 D", lambda p, x: torch.cat((x, p[None].repeat(len(x), 1, 1)), dim=1)),
    "cat of rows": ("1 1 D", lambda p, x: torch.cat([torch.cat([p] * len(x)), x], -2)),
    "stack": ("D", lambda p, x: torch.stack([x, p.expand(x.shape)], 2)),
    "copied, then changed": ("1 1 D", lambda p, x: x * p.repeat(len(x), 1, 1).exp()),
    "times rows": ("1 1 D", lambda p, x: x + p * torch.ones(len(x), 1, 1, dtype=x.dtype)),
    "expand_as": ("D", lambda p, x: x * p.expand_as(x)),
    "to": ("D", lambda p, x: x * p.to(x).view_as(x[0, 0])),
    "normalised": ("D", lambda p, x: x * torch.softmax(p, 0).unsqueeze(0)),
    "attribute": ("D 1", lambda p, x: x + p.mT),
    "of two kinds": ("2 D", lambda p, x: (1 + p[0].tanh()) * x + p[1]),
    "written into constants": ("D", written_into_constants),
    "scaled by a written constant": ("D", scaled_by_a_written_constant),
    "times a constant from outside": ("D", times_a_constant_from_outside),
    "half detached": ("D", half_detached),
    "interpolated": ("3 D", interpolated),
    "linear": ("D D", lambda p, x: F.linear(x, p)),
    "linear derived": ("D D", lambda p, x: F.linear(x, 0.1 * p, p[0])),
    "linear on vectors": ("D D", lambda p, x: F.linear(x.mean(1), p.exp())[:, None]),
    "product": ("D D", lambda p, x: x @ p),
    "product transposed": ("D D", lambda p, x: torch.matmul(x, p.T)),
    "product from the left": ("2 T", lambda p, x: p @ x),
    "product with a vector": ("D", lambda p, x: x * (x @ p)[..., None]),
    "layer norm": ("D", lambda p, x: F.layer_norm(x, x.shape[-1:], p, 2 * p)),
    "rms norm": ("D", lambda p, x: F.rms_norm(x, x.shape[-1:], weight=p)),
    "group norm": ("T", lambda p, x: F.group_norm(x, 1, p, p)),
    "attention bias": ("T T", lambda p, x: F.scaled_dot_product_attention(x, x, x, attn_mask=p)),
    "learned keys": ("1 2 D", lambda p, x: F.scaled_dot_product_attention(x, p.expand(len(x), -1, -1), p)),
}


@DTYPES
@SIZES
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("method", WATCHED[:2])
def test_every_way_of_reading(method: str, name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    shape, operation = OPERATIONS[name]
    check(reads(operation, sizes, shape, dtype), method)


def mixed_in_place(p: Tensor, x: Tensor) -> Tensor:
    token = p.repeat(len(x), 1, 1)
    return token.add_(x)


def masked(p: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x[x[..., 0] > 0] = p
    return x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, p: Tensor) -> Tensor:
        return 2 * p

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


REFUSED: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "unknown": ("D D 1", lambda p, x: F.conv1d(x.mT, p).mT, "parameter raw: conv1d has no rule"),
    "cat to the batch": ("1 T D", lambda p, x: torch.cat([p, x])[1:], "cat joins it to the batch"),
    "in place": ("1 T D", mixed_in_place, "add writes examples into it"),
    "by a mask": ("D", masked, "setitem assigns it to some examples only"),
    "tokens first": ("D", lambda p, x: (x.transpose(0, 1) * p).transpose(0, 1), "first dimension is 5"),
    "flattened": ("D", lambda p, x: (x.flatten(0, 1) * p).view(x.shape), "first dimension is 20"),
    "batch mean": ("D", lambda p, x: x + x.mean() * p, "puts another dimension before"),
    "dimension in front": ("3 1 1 1", lambda p, x: (p * x).mean(0), "mul puts another dimension before"),
    "past the mode": ("D", lambda p, x: x + Doubled.apply(p), "used outside its layer's forward"),
    "to a layer": ("2 D", lambda p, x: x + nn.functional.linear(p, p.new_ones(1, p.shape[1])).mean() * x[:1], "first"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", WATCHED)
def test_what_has_no_rule_is_refused_by_name(method: str, name: str) -> None:
    shape, operation, words = REFUSED[name]
    case = reads(operation, (4, 5, 6), shape, torch.float32)
    engine = attach(case.model, method)
    with pytest.raises(UnsupportedModelError, match=words):
        engine.accumulate(case.loss_fn, case.batch)


@DTYPES
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("method", WATCHED)
def test_under_activation_checkpointing(method: str, reentrant: bool, dtype: torch.dtype) -> None:
    """The oracle runs the same model without reentrant checkpointing, which refuses `autograd.grad`."""
    torch.manual_seed(0)
    model, twin = raw_models.Checkpointed(reentrant).to(dtype), raw_models.Checkpointed(False).to(dtype)
    twin.load_state_dict(model.state_dict())
    batch = (torch.randn(4, 5, 6, dtype=dtype), torch.logspace(-1, 1.5, 4, dtype=dtype)[:, None].expand(4, 3))
    check(Case(model, batch, make_case("vectors").loss_fn), method, wanted_of=twin)


@pytest.mark.parametrize("method", WATCHED)
def test_a_checkpointed_function_is_refused_with_the_way_out(method: str) -> None:
    def operation(p: Tensor, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda y: y * p, x, use_reentrant=False)

    case = reads(operation, (4, 5, 6), "D", torch.float32)
    with pytest.raises(UnsupportedModelError, match="checkpoint the module whose forward reads it"):
        attach(case.model, method).accumulate(case.loss_fn, case.batch)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # rms_norm, where nothing is watched
@pytest.mark.parametrize("kind", raw_models.KINDS)
@pytest.mark.parametrize("method", WATCHED)
def test_under_bf16_autocast(method: str, kind: str) -> None:
    """Operands rounded to bf16 (relative 2^-9 each) leave norms and sum within a few per cent."""
    case = make_case(kind)

    def lowered(model: nn.Module, batch: Batch) -> Tensor:
        if next(model.parameters()).dtype == torch.float64:  # the oracle's
            return case.loss_fn(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.loss_fn(model, batch)

    check(Case(case.model, case.batch, lowered), method, tolerance=0.05)


@pytest.mark.parametrize("method", WATCHED)
def test_a_non_finite_example_is_dropped(method: str) -> None:
    case = make_case("scales")
    x, target = case.batch  # type: ignore[misc]
    x = x.clone()
    x[1, 2, 3] = float("inf")
    wanted, _ = clipped_sum(case.model, case.loss_fn, (x, target), 0.5, groups=groups_of(case.model, method))
    engine = attach(case.model, method, max_grad_norm=0.5)
    engine.accumulate(case.loss_fn, (x, target))
    got = {name: p.grad for name, p in engine.parameters.items()}
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_detach_restores_every_forward(method: str) -> None:
    case = make_case("prefix")
    if method == "opacus-ew":
        return  # refuses it
    keys = [set(vars(module)) for module in case.model.modules()]
    engine = attach(case.model, method)
    engine.accumulate(case.loss_fn, case.batch)
    engine.detach()
    assert [set(vars(module)) for module in case.model.modules()] == keys


@pytest.mark.parametrize("method", WATCHED)
def test_frozen_raw_parameters_cost_nothing(method: str) -> None:
    case = reads(lambda p, x: x * p, (4, 5, 6), "D", torch.float32)
    case.model.raw.requires_grad_(False)
    engine = attach(case.model, method)
    assert "forward" not in vars(case.model)
    engine.detach()
    check(case, method)


@DTYPES
@pytest.mark.parametrize("method", [*WATCHED, "microbatch"])
def test_transformer_block_of_diffusers(method: str, dtype: torch.dtype) -> None:
    """Its defaults: `Attention`, LayerNorm, GEGLU, and a raw scale and positions around it."""
    attention = pytest.importorskip("diffusers.models.attention")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 5, 16))
            self.block = attention.BasicTransformerBlock(16, 2, 8, cross_attention_dim=6)
            self.scale = nn.Parameter(torch.rand(16))
            self.out = nn.Linear(16, 3)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            x = x + self.positions
            return self.out(x + self.scale * self.block(x, encoder_hidden_states=context)).mean(1)

    torch.manual_seed(0)
    batch = (torch.randn(4, 5, 16), torch.randn(4, 3, 6), torch.logspace(-1, 1.5, 4)[:, None].expand(4, 3))
    check(Case(Model().to(dtype), tuple(t.to(dtype) for t in batch), make_case("vectors").loss_fn), method)
