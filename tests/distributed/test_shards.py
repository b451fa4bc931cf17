"""Two ranks whose parameters FSDP2 holds in shards are one rank with everybody's units."""

import weakref
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import map_tensors
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import CoupledExamplesError
from tests.distributed.common import (
    SHARDED,
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
from tests.models import KINDS, Case, make_case
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit

BK = "ghost_fsdp_bk"
UNEVEN = {"num_classes": 6}
"""Seven rows of labels, one for none, do not go into two shards."""


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard every top-level module that has parameters of its own alone, and the whole, but for scalars."""
    options = {"ignored_params": {p for p in model.parameters() if p.dim() == 0}, **options}
    counts: dict[nn.Parameter, int] = {}
    for child in model.children():
        for parameter in child.parameters():
            counts[parameter] = counts.get(parameter, 0) + 1
    for child in model.children():
        own = list(child.parameters())
        if own and not isinstance(child, nn.ModuleList) and all(counts[p] == 1 for p in own):
            fully_shard(child, **options)
    return fully_shard(model, **options)


def sharded_dit(**changes: Any) -> nn.Module:
    """Return the tiny DiT with a group for each block and one for the rest."""
    model = tiny_dit(**{**UNEVEN, **changes})
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def sum_error(kind: str, method: str) -> float:
    case = make_case(kind)
    wanted, threshold = oracle(case, method)
    engine = attach(shard(case.model), method, threshold)
    return error_after_step(engine, case, wanted, [mine(case.batch)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [BK, "ghost"])
def test_the_sum_is_over_both_ranks_units(on_ranks: Pool, kind: str, method: str) -> None:
    """Shards of unequal size throughout: 7, 5 and 3 rows over two ranks; tied and frozen parameters, reuse."""
    assert max(on_ranks(sum_error, kind, method)) < 1e-5


def dit_error(method: str, checkpointing: bool) -> float:
    batch = draw()
    case = Case(tiny_dit(**UNEVEN), batch, OBJECTIVE)
    wanted, threshold = oracle(case, method)
    engine = attach(sharded_dit(activation_checkpointing=checkpointing), method, threshold)
    return error_after_step(engine, case, wanted, [mine(batch)])


@pytest.mark.parametrize("method", SHARDED)
def test_a_dit_sharded_by_block(on_ranks: Pool, method: str) -> None:
    assert max(on_ranks(dit_error, method, False)) < 1e-5


def test_a_dit_with_activation_checkpointing(on_ranks: Pool) -> None:
    assert max(on_ranks(dit_error, BK, True)) < 1e-5


def virtual_steps_error(method: str) -> list[float]:
    """Rank 1 has no units in the first part and in the last, rank 0 none in the second; then the same again."""
    case = make_case("tokens", num_examples=5)
    wanted, threshold = oracle(case, method)
    engine = attach(shard(case.model), method, threshold)
    borders = [[(0, 2), (0, 0), (2, 3)], [(3, 3), (3, 5), (5, 5)]][dist.get_rank()]
    parts = [map_tensors(lambda t, a=a, b=b: t[a:b], case.batch) for a, b in borders]  # type: ignore[misc]
    errors = []
    for _ in range(2):
        errors.append(error_after_step(engine, case, wanted, parts))
        assert engine.num_dropped == 0
        engine.zero_grad()
    return errors


@pytest.mark.parametrize("method", [BK, "ghost", "per_layer"])
def test_a_rank_without_units_takes_part(on_ranks: Pool, method: str) -> None:
    assert max(map(max, on_ranks(virtual_steps_error, method))) < 1e-5


def units_error() -> float:
    """Units of several rows; rank 1 has a single unit of another size."""
    case = make_case("tokens", num_examples=7)
    units = torch.tensor([0, 0, 1, 1, 2, 2, 2])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        rows = case.loss_fn(model, (batch["x"], batch["target"]))
        ids = batch["row_to_unit"]
        return rows.new_zeros(int(ids.max()) + 1).index_add(0, ids, rows)

    x, target = case.batch
    whole = Case(case.model, {"x": x, "target": target, "row_to_unit": units}, loss_fn)
    wanted, threshold = oracle(whole, BK, units)
    own: Any = mine(whole.batch, first=4)
    own["row_to_unit"] = own["row_to_unit"] - own["row_to_unit"][0]
    engine = attach(shard(case.model), BK, threshold)
    return error_after_step(engine, whole, wanted, [own], row_to_unit=own["row_to_unit"])


def test_units_of_several_rows(on_ranks: Pool) -> None:
    assert max(on_ranks(units_error)) < 1e-5


def noise_differs(kind: str, mesh_shape: tuple[int, ...]) -> list[str]:
    case = make_case(kind)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    engine = attach(shard(case.model, mesh=mesh), BK)
    found = noise_of(engine, case, torch.Generator().manual_seed(5))
    wanted = one_ranks_noise(kind)
    return [name for name, value in wanted.items() if not torch.equal(value, found[name])]


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 1), (1, 2)], ids=["shards", "replicas", "replica of shards"])
@pytest.mark.parametrize("kind", ["words", "convs"])
def test_noise_is_one_ranks_bit_for_bit(on_ranks: Pool, kind: str, mesh_shape: tuple[int, ...]) -> None:
    assert on_ranks(noise_differs, kind, mesh_shape) == [[], []]


def hybrid_error() -> float:
    case = make_case("tokens")
    wanted, threshold = oracle(case, BK)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    engine = attach(shard(case.model, mesh=mesh), BK, threshold)
    return error_after_step(engine, case, wanted, [mine(case.batch)])


def test_replicas_of_shards(on_ranks: Pool) -> None:
    assert max(on_ranks(hybrid_error)) < 1e-5


def options_error(option: str) -> float:
    """Shard the second dimension; or keep parameters gathered; or leave one layer to every rank."""
    case = make_case("vectors" if option == "placement" else "tokens")
    wanted, threshold = oracle(case, "ghost")
    options: dict[str, Any] = {
        "placement": {"shard_placement_fn": lambda p: Shard(p.dim() - 1) if p.shape[-1] % 2 == 0 else None},
        "gathered": {"reshard_after_forward": False},
        "ignored": {"ignored_params": {case.model.get_parameter("head.weight")} if option == "ignored" else set()},
    }[option]
    model = fully_shard(case.model, **options)
    if option == "placement":
        assert any(p.placements == (Shard(1),) for p in model.parameters() if isinstance(p, DTensor))
    return error_after_step(attach(model, BK, threshold), case, wanted, [mine(case.batch)])


@pytest.mark.parametrize("option", ["placement", "gathered", "ignored"])
def test_options_of_fully_shard(on_ranks: Pool, option: str) -> None:
    assert max(on_ranks(options_error, option)) < 1e-5


def lowered_error(half_parameters: bool) -> tuple[float, list[str]]:
    """Return the error under FSDP2's bf16 policy, or of bf16 parameters, and the gradients' dtypes."""
    batch = draw()
    model = tiny_dit(**UNEVEN)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if half_parameters:
        model, policy = model.bfloat16(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    wanted, _ = clipped_sum(model, OBJECTIVE, batch, 1e9)
    engine = attach(fully_shard(model, mp_policy=policy), BK, 1e9)
    case = Case(model, batch, OBJECTIVE)
    error = error_after_step(engine, case, wanted, [mine(batch)])
    engine.zero_grad()
    return error, sorted({str(value.dtype) for value in engine.parameters.values()})


@pytest.mark.parametrize("half_parameters", [False, True], ids=["policy", "bf16 parameters"])
def test_bf16_compute_with_float32_sums(on_ranks: Pool, half_parameters: bool) -> None:
    """Operands rounded to bf16 (relative 2^-9 each) leave the sum within a few per cent, as under autocast."""
    for error, dtypes in on_ranks(lowered_error, half_parameters):
        assert error < 0.05
        assert dtypes == ["torch.float32"]


def calls_by_hand_error(method: str) -> float:
    """Sample without gradients before attaching and before the step, then run forward and backward by hand."""
    case = make_case("tokens")
    wanted, threshold = oracle(case, method)
    model = shard(case.model)
    own: Any = mine(case.batch)
    with torch.no_grad():
        model(own[0])
    engine = attach(model, method, threshold)
    with torch.no_grad():
        model(own[0])
    engine.accumulate(case.loss_fn, own)
    engine.zero_grad()
    engine.backward(case.loss_fn(engine.forward_model, own))
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    error = relative_error(gradients(engine), wanted)
    engine.zero_grad()
    assert "losses: got none" in message_of(lambda: engine.backward(torch.zeros(0, requires_grad=True) * 1))
    return error


@pytest.mark.parametrize("method", [BK, "ghost"])
def test_a_forward_that_the_caller_ran(on_ranks: Pool, method: str) -> None:
    assert max(on_ranks(calls_by_hand_error, method)) < 1e-5


def losses_by_hand_first(method: str) -> tuple[float, str, str]:
    """Begin with a backward, which looks at the graph; then change the sum from outside, then couple the examples."""
    case = make_case("tokens")
    wanted, threshold = oracle(case, method)
    engine = attach(shard(case.model), method, threshold)
    own: Any = mine(case.batch)
    engine.backward(case.loss_fn(engine.forward_model, own))
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    error = relative_error(gradients(engine), wanted)
    engine.zero_grad()
    engine.backward(case.loss_fn(engine.forward_model, own))
    gradient = next(iter(engine.parameters.values())).grad
    assert gradient is not None
    gradient.mul_(2.0)
    changed = message_of(lambda: engine.privatize(noise_multiplier=0.0, expected_batch_size=1))
    engine.zero_grad()
    engine.detach()

    def mixed(model: nn.Module, batch: Any) -> Tensor:
        losses = case.loss_fn(model, batch)
        return losses * losses.mean()

    again = attach(case.model, method, threshold)
    return error, changed, message_of(lambda: again.backward(mixed(again.forward_model, own)))


@pytest.mark.parametrize("method", SHARDED)
def test_a_first_backward_looks_for_coupling_and_its_sum_is_guarded(on_ranks: Pool, method: str) -> None:
    for error, changed, mixed in on_ranks(losses_by_hand_first, method):
        assert error < 1e-5
        assert "was changed from outside" in changed
        assert "depends on another's rows" in mixed


def communication() -> tuple[dict[str, int], dict[str, int], int, int]:
    """Count collectives of a step and of ordinary training, parameters, and the most full-shape sums held at once."""
    case = make_case("tokens")
    own: Any = mine(case.batch)
    model = shard(case.model)
    with CommDebugMode() as ordinary:
        case.loss_fn(model, own).sum().backward()
    model.zero_grad()
    engine = attach(model, BK)
    engine.accumulate(case.loss_fn, own)  # the trial
    engine.zero_grad()
    held: list[Any] = []
    most = _watch_sums(engine, held)
    with CommDebugMode() as ours:
        engine.accumulate(case.loss_fn, own)
    return _counts(ours), _counts(ordinary), len(engine.parameters), max(most)


def _watch_sums(engine: Engine, held: list[Any]) -> list[int]:
    """Have every full-shape sum counted, with those before it that are still alive."""
    most: list[int] = []
    share = engine.ranks.share

    def watched(parameter: nn.Parameter, total: Tensor) -> Tensor:
        held.append(weakref.ref(total.untyped_storage()))
        most.append(sum(reference() is not None for reference in held))
        return share(parameter, total)

    engine.ranks.share = watched  # type: ignore[method-assign]
    return most


def _counts(mode: CommDebugMode) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for operation, count in mode.get_comm_counts().items():
        kind = "scatter" if "scatter" in str(operation) else "gather" if "gather" in str(operation) else "other"
        kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def test_fsdp2_has_nothing_to_reduce_and_one_full_sum_lives_at_a_time(on_ranks: Pool) -> None:
    for ours, ordinary, parameters, most in on_ranks(communication):
        assert ours == {"gather": ordinary["gather"], "scatter": parameters}
        assert most == 1


def trained(sharded: bool) -> list[float]:
    """Train three steps with noise; return all parameters."""
    case = make_case("tokens", num_examples=6)
    group = None if sharded else dist.group.WORLD
    model = shard(case.model) if sharded else case.model
    engine = attach(model, BK, process_group=group)
    optimizer = torch.optim.AdamW(engine.parameters.values())
    generator = torch.Generator().manual_seed(3)
    for first in (1, 6, 4):
        engine.accumulate(case.loss_fn, mine(case.batch, first))
        engine.privatize(noise_multiplier=1.0, expected_batch_size=6, generator=generator)
        optimizer.step()
        engine.zero_grad()
    engine.detach()
    assert all(isinstance(p, DTensor) == sharded and p.grad is None for p in model.parameters())
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full]).tolist()  # type: ignore[no-any-return]


def test_training_is_that_of_replicas(on_ranks: Pool) -> None:
    shards, replicas = on_ranks(trained, True), on_ranks(trained, False)
    assert shards[0] == shards[1]
    torch.testing.assert_close(torch.tensor(shards[0]), torch.tensor(replicas[0]))


class Mixing(nn.Module):
    """A mean over the batch between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden - hidden.mean(0)).mean(1)


def coupled_is_found() -> str:
    case = make_case("tokens")
    torch.manual_seed(0)
    engine = attach(shard(Mixing()), BK)
    try:
        engine.accumulate(case.loss_fn, mine(case.batch))
    except CoupledExamplesError as error:
        return str(error)
    return "no error"


def test_examples_that_are_not_kept_apart_are_found(on_ranks: Pool) -> None:
    """Rank 1 has one unit only: its trial is made with one of zeros beside it."""
    assert all("no per-example gradient exists" in message for message in on_ranks(coupled_is_found))


class Bias(nn.Module):
    """Holds a parameter and hands it back."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.5 * torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.sin()


class Given(NamedTuple):
    """What blocks share."""

    positions: Tensor
    scale: Tensor


class Block(nn.Module):
    """Adds what it is given, and tells that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, ran: list[Any], *, given: dict[str, Given]) -> Tensor:
        ran.append(self)
        shared = given["shared"]
        return x + torch.tanh(self.layer(x + shared.positions) * shared.scale)


class Passed(nn.Module):
    """Blocks, each sharded alone, that are handed raw parameters of the root's, and one that is made of such."""

    def __init__(self, bias_by: str = "module") -> None:
        super().__init__()
        self.positions, self.scale = nn.Parameter(0.5 * torch.randn(5, 6)), nn.Parameter(torch.randn(6))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.tail, self.out, self.bias_by = Bias(), nn.Linear(6, 3), bias_by
        self.layer, self.raises = nn.Linear(6, 6), False

    def forward(self, x: Tensor) -> Tensor:
        ran: list[Any] = []
        for block in self.blocks:
            x = block(x, ran, given={"shared": Given(self.positions, self.scale.sin())})
        assert len(ran) == len(self.blocks)
        if self.raises:
            raise ValueError
        if self.bias_by == "layer":
            x = x + self.layer(self.scale.sin().expand(len(x), -1))[:, None]
        return self.out(x + (self.tail.bias if self.bias_by == "name" else self.tail(x))).mean(1)


def sharded_by_hand(model: Passed) -> nn.Module:
    for module in (*model.blocks, model.tail, model.layer, model):
        fully_shard(module)
    return model


def passed_case() -> Case:
    case = make_case("tokens")
    torch.manual_seed(0)
    return Case(Passed(), case.batch, case.loss_fn)


def passed_error(method: str) -> tuple[float, str, str]:
    """Return the error; and what is said of a parameter read where it is not gathered, or by a sharded layer."""
    case = passed_case()
    wanted, threshold = oracle(case, method)
    own: Any = mine(case.batch)
    error = error_after_step(attach(sharded_by_hand(case.model), method, threshold), case, wanted, [own])
    astray = attach(sharded_by_hand(Passed(bias_by="name")), method)
    layered = attach(sharded_by_hand(Passed(bias_by="layer")), method)
    return (
        error,
        message_of(lambda: astray.accumulate(case.loss_fn, own)),
        message_of(lambda: layered.accumulate(case.loss_fn, own)),
    )


@pytest.mark.parametrize("method", [BK, "ghost"])
def test_raw_parameters_handed_to_a_sharded_module(on_ranks: Pool, method: str) -> None:
    for error, astray, layered in on_ranks(passed_error, method):
        assert error < 1e-5
        assert "parameter tail.bias is read while FSDP2 has not gathered it" in astray
        assert "parameter scale is used outside its layer's forward" in layered
        assert "\n" not in astray + layered


def error_after_a_failure() -> float:
    """Return the error of an engine that is attached after another's forward has raised."""
    case = passed_case()
    wanted, threshold = oracle(case, BK)
    own: Any = mine(case.batch)
    engine = attach(sharded_by_hand(case.model), BK, threshold)
    case.model.raises = True  # type: ignore[assignment]
    with pytest.raises(ValueError):
        engine.accumulate(case.loss_fn, own)
    case.model.raises = False  # type: ignore[assignment]
    engine.detach()
    return error_after_step(attach(case.model, BK, threshold), case, wanted, [own])


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="older torch cannot be told")
def test_another_engine_after_a_forward_that_raised(on_ranks: Pool) -> None:
    assert max(on_ranks(error_after_a_failure)) < 1e-5


def scalar_after_attach() -> float:
    """Return what a rank holds of a scalar that ranks began with apart, once an engine is attached."""
    model = nn.Sequential(nn.Linear(6, 4))
    model.register_parameter("scale", nn.Parameter(torch.tensor(float(dist.get_rank()))))
    engine = attach(fully_shard(model, ignored_params={model.scale}), BK)
    engine.detach()
    return model.scale.item()  # type: ignore[no-any-return]


def test_what_is_left_to_every_rank_begins_alike(on_ranks: Pool) -> None:
    assert on_ranks(scalar_after_attach) == [0.0, 0.0]


def attach_wrongly() -> dict[str, str]:
    model = shard(make_case("tokens").model)
    mesh = init_device_mesh("cpu", (2,))
    parallel = nn.Linear(4, 4)
    parallel.weight = nn.Parameter(distribute_tensor(parallel.weight.detach(), mesh, [Shard(1)]))
    found = {name: message_of(lambda name=name: attach(model, name)) for name in METHODS if name not in SHARDED}  # type: ignore[misc]
    found["group"] = message_of(lambda: attach(model, BK, process_group=dist.group.WORLD))
    found["parallel"] = message_of(lambda: attach(parallel, BK))
    older = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # to build one takes a GPU
    nn.Module.__init__(older)
    found["fsdp1"] = message_of(lambda: attach(nn.Sequential(older, nn.Linear(4, 4)), BK))
    assert isinstance(model, FSDPModule)
    attach(model, BK)  # nothing that was refused is left attached
    return found


def test_wrong_usage_is_named(on_ranks: Pool) -> None:
    for found in on_ranks(attach_wrongly):
        assert "mesh says which ranks" in found.pop("group")
        assert "take out tensor parallelism" in found.pop("parallel")
        assert "use fully_shard" in found.pop("fsdp1")
        for name, message in found.items():
            assert message.startswith(f"method: got '{name}'"), message
            assert BK in message
