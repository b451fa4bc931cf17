"""Every method on models compiled in every way: the clipped sum is that of the model as written."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import EngineStateError, UnsupportedModelError
from tests import workload_models
from tests.models import Case, groups_of, make_case
from tests.oracle.test_dit import OBJECTIVE, draw, tiny_dit
from tests.oracle.test_methods import median_norm, relative_error

OURS = [name for name, method in METHODS.items() if method.private and not method.peer]
WATCHED = [name for name in OURS if name != "microbatch"]
COMPILED = [name for name, method in METHODS.items() if method.private and method.supports_compile]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # tracing reads it


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def blocks_in_place(model: nn.Module, backend: str) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    return model


def blocks_replaced(model: nn.Module, backend: str) -> nn.Module:
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        model.blocks[index] = torch.compile(block, backend=backend)  # type: ignore[index, operator]
    return model


FORMS = (whole, in_place, blocks_in_place, blocks_replaced)


def plainly(name: str) -> str:
    return name.replace("_orig_mod.", "")


def check(
    case: Case,
    model: nn.Module,
    method: str,
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    compiles: bool = True,
) -> None:
    """Compare two steps on a compiled model with the oracle on the same model as it was written."""
    threshold = median_norm(case)
    groups = groups_of(case.model, method)
    wanted, _ = clipped_sum(case.model, case.loss_fn, case.batch, threshold, groups=groups)
    engine = attach(model, method, max_grad_norm=threshold)
    for _ in range(2):  # the second step runs what the first compiled
        engine.zero_grad()
        engine.accumulate(loss_fn or case.loss_fn, case.batch)
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        got = {plainly(name): p.grad for name, p in engine.parameters.items()}
        assert relative_error(got, wanted) < 1e-5  # type: ignore[arg-type]
    engine.detach()
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiles


def dit_case() -> Case:
    return Case(tiny_dit(), draw(), OBJECTIVE)


@pytest.mark.parametrize("form", FORMS, ids=[form.__name__ for form in FORMS])
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.full), "aot_eager"])
@pytest.mark.parametrize("method", OURS)
def test_compiled_before_attach(method: str, backend: str, form: Callable[[nn.Module, str], nn.Module]) -> None:
    model = form(tiny_dit(), backend)
    if (method, form) == ("lean", blocks_in_place):
        with pytest.raises(UnsupportedModelError, match=r"put torch.compile\(block\) in its place"):
            attach(model, method)
        return
    check(dit_case(), model, method)


@pytest.mark.parametrize("method", OURS)
def test_compiled_after_attach(method: str) -> None:
    """The loss calls the compiled model, the engine holds the one it was attached to."""
    model = tiny_dit()
    compiled: list[nn.Module] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if not compiled:
            compiled.append(whole(model, "aot_eager"))
        return OBJECTIVE(compiled[0], batch)

    check(dit_case(), model, method, loss_fn)


def test_batches_that_change_in_size() -> None:
    """As Poisson sampling draws them: from the second size on shapes are dynamic, and compiled code differs."""
    model = in_place(tiny_dit(), "aot_eager")
    engine = attach(model, "ghost", max_grad_norm=0.1)
    for count in (4, 3):
        engine.zero_grad()
        engine.accumulate(OBJECTIVE, draw(count))
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        wanted, _ = clipped_sum(tiny_dit(), OBJECTIVE, draw(count), 0.1)
        assert relative_error({name: p.grad for name, p in engine.parameters.items()}, wanted) < 1e-5  # type: ignore[misc]


def test_blocks_of_two_widths() -> None:
    """One forward for encoder and decoder, so that it is compiled for sizes that change within a model."""
    objective, batch, _ = workload_models.draw("ddt")
    case = Case(workload_models.build("ddt"), batch, objective)
    check(case, in_place(workload_models.build("ddt"), "aot_eager"), "ghost")


@pytest.mark.parametrize("kind", ["convs", "words", "reused", "blocks"])
@pytest.mark.parametrize("method", WATCHED)
def test_layers_of_every_kind(method: str, kind: str) -> None:
    compiles = (method, kind) != ("lean", "blocks")  # blocks that are recomputed run as written
    check(make_case(kind), in_place(make_case(kind).model, "aot_eager"), method, compiles=compiles)


class Positions(nn.Module):
    """A raw parameter between layers, in a block that may be compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6)])
        self.positions = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](torch.tanh(x + self.positions)).sum(1)


@pytest.mark.parametrize("form", [whole, in_place, blocks_replaced], ids=["whole", "in_place", "blocks_replaced"])
@pytest.mark.parametrize("method", WATCHED)
def test_raw_parameters_are_followed_in_a_model_as_written(
    method: str, form: Callable[[nn.Module, str], nn.Module]
) -> None:
    """Compiled code would not show what it does with them, so under watch such a model runs uncompiled."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Positions())
    batch = (torch.randn(4, 5, 6), torch.randn(4, 6))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean(1)  # type: ignore[index]

    check(Case(models[0], batch, loss_fn), form(models[1], "aot_eager"), method, compiles=False)


@pytest.mark.parametrize("method", [name for name in COMPILED if METHODS[name].peer])
@pytest.mark.filterwarnings("ignore")
def test_peers(method: str) -> None:
    check(dit_case(), in_place(tiny_dit(), "aot_eager"), method)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("method", WATCHED)
@pytest.mark.filterwarnings("ignore")
def test_inductors_buffers_are_not_what_an_engine_keeps(method: str) -> None:
    """Inductor writes over buffers it thinks are free; operands that are booked must not be among them."""
    options: dict[str, Any] = {"keep_up_to": 0.0} if method == "bookkeeping" else {}
    case = dit_case()
    threshold = median_norm(case)
    wanted, _ = clipped_sum(case.model, OBJECTIVE, case.batch, threshold, groups=groups_of(case.model, method))
    engine = attach(in_place(tiny_dit(), "inductor"), method, max_grad_norm=threshold, **options)
    engine.accumulate(OBJECTIVE, case.batch)
    got = {name: p.grad for name, p in engine.parameters.items()}
    assert relative_error(got, wanted) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("method", WATCHED)
def test_blocks_of_a_kind_share_what_is_compiled(method: str) -> None:
    """A guard on one layer's own function would compile every block anew, and past eight none."""
    frames = []
    for depth in (2, 10):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine = attach(in_place(tiny_dit(depth=depth), "eager"), method, max_grad_norm=1.0)
        engine.accumulate(OBJECTIVE, draw())
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] == frames[1] > 1


@pytest.mark.parametrize("method", WATCHED)
def test_one_whole_graph_is_refused_by_name(method: str) -> None:
    model = torch.compile(tiny_dit(), backend="eager", fullgraph=True)
    engine = attach(model, method)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="fullgraph=True, or use method='microbatch'") as caught:
        engine.accumulate(OBJECTIVE, draw())
    assert "\n" not in str(caught.value)


def test_one_whole_graph_with_microbatch() -> None:
    check(dit_case(), torch.compile(tiny_dit(), backend="aot_eager", fullgraph=True), "microbatch")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ghost", "flash_clip"])
def test_what_was_compiled_to_be_walked_once_is_not_walked_twice(method: str) -> None:
    """Ordinary training compiled the loss; its backward would write over what the second walk reads."""
    model = tiny_dit()
    loss_fn = torch.compile(lambda output: output.tanh().sin().square().flatten(1).mean(1), backend="aot_eager")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return loss_fn(model(batch["x_t"], batch["t"], batch["y"], drop_labels=batch["drop_labels"]))  # type: ignore[call-overload, no-any-return]

    loss(model, draw()).sum().backward()
    model.zero_grad()
    engine = attach(model, method)
    with pytest.raises(EngineStateError, match=r"walked once.*torch.compiler.reset"):
        engine.accumulate(loss, draw())
    engine.zero_grad()
    torch.compiler.reset()
    engine.accumulate(loss, draw())
