"""What a user does behind an engine's back, or hands to it by mistake, is an error by name and never a wrong sum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import CoupledExamplesError, EngineStateError, UsageError
from tests.models import Case, groups_of, make_case
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit
from tests.unit.test_engine import Coupled

ALL = list(METHODS)
PEERS = [name for name, method in METHODS.items() if method.peer]
WATCHED = [name for name, facts in METHODS.items() if facts.private and not facts.peer and name != "microbatch"]
"""Methods that look for coupling between examples."""

OUTSIDE: dict[str, Callable[[nn.Module], None]] = {
    "backward past the layers": lambda model: (1e3 * next(model.parameters()).square().sum()).backward(),
    "zero_grad": lambda model: model.zero_grad(),
    "zero_grad in place": lambda model: model.zero_grad(set_to_none=False),
    "replaced": lambda model: setattr(next(model.parameters()), "grad", torch.ones(5, 6)),
    "clipped once more": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None,
}


def privatize(engine: Engine) -> None:
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)


def assert_sum(engine: Engine, wanted: dict[str, Tensor]) -> None:
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-6)


def oracle(case: Case, method: str) -> dict[str, Tensor]:
    return clipped_sum(case.model, case.loss_fn, case.batch, 0.5, groups=groups_of(case.model, method))[0]


# --- the sum between accumulate and privatize -------------------------------------------------------------------


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("method", [name for name in ALL if name not in PEERS])
def test_a_sum_that_was_changed_from_outside_is_refused(method: str, how: str) -> None:
    case = make_case("vectors")
    engine = attach(case.model, method)
    for call in (privatize, lambda engine: engine.accumulate(case.loss_fn, case.batch)):
        engine.accumulate(case.loss_fn, case.batch)
        OUTSIDE[how](case.model)
        with pytest.raises(EngineStateError, match=r"gradient of parameter \w+\.weight was changed from outside"):
            call(engine)
        engine.zero_grad()


@pytest.mark.parametrize("method", PEERS)
def test_a_peers_sum_does_not_lie_where_others_write(method: str) -> None:
    case = make_case("vectors")
    wanted = oracle(case, method)
    engine = attach(case.model, method, 0.5)
    engine.accumulate(case.loss_fn, case.batch)
    case.model.zero_grad()
    privatize(engine)
    assert_sum(engine, wanted)


def test_a_gradient_of_a_half_precision_parameter_with_a_master_is_refused() -> None:
    case = make_case("vectors")
    model = case.model.bfloat16()
    batch = tuple(t.bfloat16() for t in case.batch)  # type: ignore[union-attr]
    engine = attach(model, "ghost")
    engine.accumulate(case.loss_fn, batch)
    next(model.parameters()).square().sum().backward()
    with pytest.raises(EngineStateError, match="was changed from outside"):
        privatize(engine)


@pytest.mark.parametrize("method", WATCHED)
def test_a_backward_that_is_not_the_engines_is_named_and_leaves_the_sum_alone(method: str) -> None:
    case = make_case("tokens")
    wanted = oracle(case, method)
    engine = attach(case.model, method, 0.5)
    engine.accumulate(case.loss_fn, case.batch)
    with pytest.raises(EngineStateError, match=f"which {method} is attached to, from outside the engine"):
        case.loss_fn(case.model, case.batch).sum().backward()
    engine.accumulate(case.loss_fn, case.batch)
    privatize(engine)
    assert_sum(engine, {name: 2 * total for name, total in wanted.items()})


def test_a_refused_privatize_can_be_repeated_and_still_guards_the_sum() -> None:
    case = make_case("vectors")
    engine = attach(case.model, "vanilla")
    engine.accumulate(case.loss_fn, case.batch)
    with pytest.raises(UsageError, match="noise_multiplier"):
        engine.privatize(noise_multiplier=1.0, expected_batch_size=4)
    case.model.zero_grad()
    with pytest.raises(EngineStateError, match="was changed from outside"):
        privatize(engine)


# --- the optimizer's zero_grad in place of the engine's ---------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_the_optimizers_own_zero_grad_will_do(method: str) -> None:
    weights = []
    for own in (False, True):
        case = make_case("vectors")
        engine = attach(case.model, method, 0.5)
        optimizer = torch.optim.SGD(engine.parameters.values(), lr=0.1)
        for _ in range(3):
            engine.accumulate(case.loss_fn, case.batch)
            engine.privatize(noise_multiplier=0.0, expected_batch_size=4)
            optimizer.step()
            optimizer.zero_grad() if own else engine.zero_grad()
        weights.append([p.detach() for p in case.model.parameters()])
    for wanted, got in zip(*weights, strict=True):
        assert torch.equal(wanted, got)


def test_masters_reach_the_model_whoever_clears_the_gradients() -> None:
    case = make_case("vectors")
    model = case.model.bfloat16()
    batch = tuple(t.bfloat16() for t in case.batch)  # type: ignore[union-attr]
    engine = attach(model, "bookkeeping")
    optimizer = torch.optim.SGD(engine.parameters.values(), lr=10.0)
    engine.accumulate(case.loss_fn, batch)
    privatize(engine)
    optimizer.step()
    optimizer.zero_grad()
    losses = case.loss_fn(engine.forward_model, batch)
    with pytest.raises(EngineStateError, match="before the float32 masters were written back"):
        engine.backward(losses)
    engine.accumulate(case.loss_fn, batch)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, engine.parameters[name].bfloat16()), name


# --- examples that are not kept apart ---------------------------------------------------------------------------


def first(case: Case, count: int) -> Any:
    return tuple(t[:count] for t in case.batch)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", WATCHED)
def test_coupling_is_found_once_there_are_two_examples(method: str) -> None:
    case = make_case("tokens")
    engine = attach(Coupled(lambda x: x - x.mean(0)), method)
    for _ in range(2):
        engine.accumulate(case.loss_fn, first(case, 1))
    with pytest.raises(CoupledExamplesError):
        engine.accumulate(case.loss_fn, case.batch)


@pytest.mark.parametrize(
    "mix",
    [lambda x: x - x.mean(0), lambda x: x + 1e-6 * x.roll(1, 0), lambda x: x + torch.cumsum(x, 0)],
    ids=["batch mean", "neighbour", "those before"],
)
@pytest.mark.parametrize("method", WATCHED)
def test_coupling_is_found_in_the_graph_of_given_losses(method: str, mix: Callable[[Tensor], Tensor]) -> None:
    case = make_case("tokens")
    engine = attach(Coupled(mix), method)
    engine.backward(case.loss_fn(engine.forward_model, first(case, 1)))
    with pytest.raises(CoupledExamplesError):
        engine.backward(case.loss_fn(engine.forward_model, case.batch))


@pytest.mark.parametrize("method", WATCHED)
def test_what_a_graph_does_not_show_is_found_by_the_first_accumulate(method: str) -> None:
    case = make_case("tokens")
    engine = attach(Coupled(lambda x: x + torch.cumsum(x, 0).detach() * x), method)
    engine.backward(case.loss_fn(engine.forward_model, case.batch))
    with pytest.raises(CoupledExamplesError):
        engine.accumulate(case.loss_fn, case.batch)


@pytest.mark.parametrize("method", WATCHED)
def test_looking_at_the_graph_changes_nothing(method: str) -> None:
    """Blocks included; the input, a leaf that takes a gradient, gets that of the real backward alone."""
    found = []
    for looks in (True, False):
        model, batch = tiny_dit(depth=3), dict(draw())
        x = batch["x_t"] = batch["x_t"].clone().requires_grad_()
        engine: Any = attach(model, method, 0.5)
        engine._graph_examined = not looks
        norms = engine.backward(OBJECTIVE(engine.forward_model, batch))
        assert engine._graph_examined
        privatize(engine)
        found.append([norms, x.grad, *[p.grad for p in engine.parameters.values()]])
    for looked, plain in zip(*found, strict=True):
        assert torch.equal(looked, plain)


class _Once(torch.autograd.Function):
    """Lets go of what it saved when it is walked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = torch.full_like(x, 2.0)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        factor, ctx.factor = ctx.factor, None
        return factor * gradients[0]


def test_a_graph_that_can_be_walked_but_once_is_left_alone() -> None:
    case = make_case("tokens")
    engine = attach(Coupled(_Once.apply), "bookkeeping")  # type: ignore[arg-type]
    assert engine.backward(case.loss_fn(engine.forward_model, case.batch)) is not None


# --- a model that is not as it was attached ---------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "layer replaced": (lambda model: setattr(model, "last", nn.Identity()), "module last was replaced"),
    "coupling added": (
        lambda model: model.add_module("norm", nn.BatchNorm1d(3, affine=False)),
        "module norm was added",
    ),
    "layer removed": (lambda model: delattr(model, "last"), "module last was removed"),
    "bias removed": (lambda model: model.last.register_parameter("bias", None), r"last\.bias was removed"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ALL)
def test_a_module_added_removed_or_replaced_after_attach_is_refused(method: str, change: str) -> None:
    model, case = Coupled(lambda x: x), make_case("tokens")
    engine = attach(model, method)
    engine.accumulate(case.loss_fn, case.batch)
    engine.zero_grad()
    edit, words = CHANGES[change]
    edit(model)
    with pytest.raises(EngineStateError, match=f"model: {words} after attach"):
        engine.accumulate(case.loss_fn, case.batch)


# --- arguments --------------------------------------------------------------------------------------------------


def test_settings_a_method_does_not_take_are_named() -> None:
    with pytest.raises(UsageError, match=r"^foo: method 'ghost' does not take it; accepted: no setting; leave it out$"):
        attach(nn.Linear(2, 2), "ghost", foo=1)
    with pytest.raises(UsageError, match=r"^memory_budget: .*accepted: keep_up_to; use method='auto'$"):
        attach(nn.Linear(2, 2), "bookkeeping", memory_budget=10)


def test_a_model_that_is_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model: got 'type'; accepted: a torch\.nn\.Module"):
        attach(nn.Linear, "ghost")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(4, 6), r"batch: got 'a tensor'; .*write \(batch,\)"),
        (None, "batch: got 'NoneType'; accepted: a tuple or a dict of tensors"),
        ((torch.zeros(4, 6), [1, 2, 3, 4]), r"batch\[1\]: got 'list'; accepted: a tensor"),
        ({"x": torch.zeros(4, 6), "y": None}, r"batch\['y'\]: got 'NoneType'"),
        ("text", r"batch\[0\]: got 'str'"),
    ],
)
def test_what_is_no_batch_is_named(batch: Any, words: str) -> None:
    case = make_case("vectors")
    with pytest.raises(UsageError, match=words):
        attach(case.model, "ghost").accumulate(case.loss_fn, batch)


def test_a_map_of_units_may_be_a_list() -> None:
    case = make_case("vectors")

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return case.loss_fn(model, batch).view(-1, 2).mean(1)

    norms = attach(case.model, "ghost").accumulate(loss_fn, case.batch, [0, 0, 1, 1])
    assert norms is not None
    assert norms.shape == (2,)
    for wrong in (["a"] * 4, [[0], [0, 1]], object()):
        other = make_case("vectors")
        with pytest.raises(UsageError, match="row_to_unit: got "):
            attach(other.model, "ghost").accumulate(loss_fn, other.batch, wrong)  # type: ignore[arg-type]
