"""Two ranks with the whole model each, plain or in DDP, are one rank with everybody's units."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import map_tensors
from dit_dp.errors import UsageError
from tests.distributed.common import (
    OURS,
    error_after_step,
    gradients,
    message_of,
    mine,
    noise_of,
    one_ranks_noise,
    oracle,
    relative_error,
)
from tests.distributed.pool import Pool
from tests.models import KINDS, make_case
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit


def sum_error(kind: str, method: str) -> float:
    case = make_case(kind)
    wanted, threshold = oracle(case, method)
    engine = attach(case.model, method, threshold, process_group=dist.group.WORLD)
    return error_after_step(engine, case, wanted, [mine(case.batch)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_over_both_ranks_units(on_ranks: Pool, kind: str) -> None:
    assert max(on_ranks(sum_error, kind, "bookkeeping")) < 1e-5


@pytest.mark.parametrize("method", OURS)
def test_every_method_of_ours_sums(on_ranks: Pool, method: str) -> None:
    assert max(on_ranks(sum_error, "blocks", method)) < 1e-5


def ddp_dit_error(by_wrapper: bool) -> tuple[float, bool, bool]:
    """Return the error, whether DDP reduces while attached, and whether it does afterwards."""
    model = tiny_dit()
    batch = draw()
    wanted, norms = _dit_oracle(model, batch)
    wrapped = DistributedDataParallel(model)
    engine = attach(wrapped, "bookkeeping", norms)
    own = mine(batch)
    if by_wrapper:
        engine.backward(OBJECTIVE(wrapped, own))
    else:
        engine.accumulate(OBJECTIVE, own)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    error = relative_error(gradients(engine), wanted)
    during = wrapped.require_backward_grad_sync
    engine.detach()
    return error, during, wrapped.require_backward_grad_sync


def _dit_oracle(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    from tests.models import Case

    return oracle(Case(model, batch, OBJECTIVE), "bookkeeping")


@pytest.mark.parametrize("by_wrapper", [True, False], ids=["the wrapper called", "the module called"])
def test_a_dit_in_ddp_whose_own_reduction_rests(on_ranks: Pool, by_wrapper: bool) -> None:
    for error, during, afterwards in on_ranks(ddp_dit_error, by_wrapper):
        assert error < 1e-5
        assert not during
        assert afterwards


def virtual_steps_error() -> float:
    """Rank 0 has three parts, one of them empty, rank 1 a single one."""
    case = make_case("tokens", num_examples=5)
    wanted, threshold = oracle(case, "bookkeeping")
    engine = attach(case.model, "bookkeeping", threshold, process_group=dist.group.WORLD)
    borders = [(0, 1), (1, 1), (1, 3)] if dist.get_rank() == 0 else [(3, 5)]
    parts = [map_tensors(lambda t, a=a, b=b: t[a:b], case.batch) for a, b in borders]  # type: ignore[misc]
    return error_after_step(engine, case, wanted, parts)


def test_nothing_is_sent_until_privatize(on_ranks: Pool) -> None:
    """Ranks that accumulate unequally often would wait for each other for ever."""
    assert max(on_ranks(virtual_steps_error)) < 1e-5


def empty_rank_error(method: str) -> float:
    case = make_case("vectors")
    wanted, threshold = oracle(case, method)
    engine = attach(case.model, method, threshold, process_group=dist.group.WORLD)
    return error_after_step(engine, case, wanted, [mine(case.batch, first=4)])


@pytest.mark.parametrize("method", OURS)
def test_a_rank_without_units_adds_nothing(on_ranks: Pool, method: str) -> None:
    assert max(on_ranks(empty_rank_error, method)) < 1e-5


def noise_differs() -> list[str]:
    case = make_case("words")
    engine = attach(case.model, "bookkeeping", process_group=dist.group.WORLD)
    found = noise_of(engine, case, torch.Generator().manual_seed(5))
    wanted = one_ranks_noise("words")
    return [name for name, value in wanted.items() if not torch.equal(value, found[name])]


def test_noise_is_one_ranks_bit_for_bit(on_ranks: Pool) -> None:
    assert on_ranks(noise_differs) == [[], []]


def own_noise() -> tuple[list[float], float]:
    """Return the first numbers of three releases, and the standard deviation of the last in units of sigma C / 3."""
    case = make_case("tokens")
    model = nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 3))
    first = []
    for _ in range(3):
        engine = attach(model, "ghost", process_group=dist.group.WORLD)
        found = noise_of(engine, case)
        first.append(float(found["0.weight"][0, 0]))
        engine.detach()
    return first, float(torch.cat([value.flatten() for value in found.values()]).std()) * 3 / 2.0


def test_the_engines_own_noise_is_shared_fresh_and_added_once(on_ranks: Pool) -> None:
    (first, size), (other, same) = on_ranks(own_noise)
    assert first == other
    assert len(set(first)) == 3
    assert size == same
    assert abs(size - 1) < 0.08  # 4,003 draws: 7 standard errors; added by both ranks it would be 1.41


def parameters_after_steps(method: str) -> tuple[list[float], float]:
    """Train three steps on batches of changing size, from ranks that were initialised differently."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    case = make_case("vectors", num_examples=9)
    sigma = 1.0 if METHODS[method].private else 0.0
    engine = attach(model, method, process_group=dist.group.WORLD)
    optimizer = torch.optim.AdamW(engine.parameters.values())
    before = model[0].weight.detach().clone()
    for first in (5, 9, 1):
        engine.accumulate(case.loss_fn, mine(case.batch, first))
        engine.privatize(noise_multiplier=sigma, expected_batch_size=9)
        optimizer.step()
        engine.zero_grad()
    moved = float((model[0].weight.detach() - before).abs().max())
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(), moved


@pytest.mark.parametrize("method", ["vanilla", "ghost", "bookkeeping"])
def test_ranks_stay_the_same_model(on_ranks: Pool, method: str) -> None:
    (one, moved), (other, _) = on_ranks(parameters_after_steps, method)
    assert one == other
    assert moved > 0


def vanilla_error() -> float:
    case = make_case("tokens")
    case.loss_fn(case.model, case.batch).mean().backward()
    wanted = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    engine = attach(DistributedDataParallel(case.model), "vanilla")
    engine.accumulate(case.loss_fn, mine(case.batch))
    engine.privatize(noise_multiplier=0.0, expected_batch_size=4)
    return relative_error(gradients(engine), wanted)


def test_vanilla_takes_the_mean_over_both_ranks(on_ranks: Pool) -> None:
    assert max(on_ranks(vanilla_error)) < 1e-5


def privatize_unlike(argument: str) -> str:
    case = make_case("vectors")
    engine = attach(case.model, "ghost", process_group=dist.group.WORLD)
    engine.accumulate(case.loss_fn, mine(case.batch))
    rank = dist.get_rank()
    arguments = {
        "noise_multiplier": 1.0 + rank * (argument == "noise_multiplier"),
        "expected_batch_size": 4 + rank * (argument == "expected_batch_size"),
        "generator": torch.Generator().manual_seed(rank * (argument == "generator")),
    }
    return message_of(lambda: engine.privatize(**arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["noise_multiplier", "expected_batch_size", "generator"])
def test_what_must_be_alike_is_compared(on_ranks: Pool, argument: str) -> None:
    for message in on_ranks(privatize_unlike, argument):
        assert message.startswith(f"{argument}: got")
        assert "the same on every rank" in message


def attach_wrongly() -> dict[str, str]:
    model = make_case("vectors").model
    world = dist.group.WORLD
    groups = [dist.new_group([rank]) for rank in range(2)]
    static = DistributedDataParallel(model, static_graph=True)
    return {
        "none": message_of(lambda: attach(model)),
        "other": message_of(lambda: attach(model, process_group=groups[1 - dist.get_rank()])),
        "text": message_of(lambda: attach(model, process_group="gloo")),  # type: ignore[arg-type]
        "peer": message_of(lambda: attach(model, "opacus", process_group=world)),
        "ddp": message_of(lambda: attach(static, process_group=groups[dist.get_rank()])),
        "static": message_of(lambda: attach(static)),
        "inside": message_of(lambda: attach(nn.Sequential(static), process_group=world)),
    }


def test_wrong_usage_is_named(on_ranks: Pool) -> None:
    for found in on_ranks(attach_wrongly):
        assert "2 ranks run: pass torch.distributed.group.WORLD" in found["none"]
        assert "a group of other ranks" in found["other"]
        assert "process_group: got 'gloo'" in found["text"]
        assert "measured on one rank" in found["peer"]
        assert "another group than DistributedDataParallel's own" in found["ddp"]
        assert "without static_graph" in found["static"]
        assert "around the whole" in found["inside"]


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(UsageError, match="init_process_group"):
        attach(nn.Linear(2, 2), process_group=object())  # type: ignore[arg-type]
