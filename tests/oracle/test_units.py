"""Privacy units of several rows, and parameters of half precision, against the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from dit_dp.clipping.units import Units
from dit_dp.errors import UnsupportedModelError, UsageError
from tests.models import Convs, Words

OURS = [name for name, method in METHODS.items() if method.private and not method.peer]
MAPS = {
    "regular": torch.arange(4).repeat_interleave(3),
    "mixed": torch.tensor([2, 0, 0, 3, 1, 0, 3, 2, 0, 3, 3, 0]),
}


class Sets(nn.Module):
    """Layers and a raw scale over rows, then over units: an embedding and convolutions a row, a head on sets' means."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.words = Convs(), Words()
        self.norm, self.head = nn.LayerNorm(19), nn.Linear(19, 3)
        self.scale = nn.Parameter(torch.rand(19))

    def forward(self, image: Tensor, words: Tensor, label: Tensor, row_to_unit: Tensor) -> Tensor:
        rows = torch.cat([self.images(image), self.words(words, label)], 1) * self.scale
        member = F.one_hot(row_to_unit).T.to(rows.dtype)
        return self.head(self.norm(member @ rows / member.sum(1, keepdim=True)) + self.scale)


def sets_loss(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(batch, dict)
    output = model(**{name: batch[name] for name in ("image", "words", "label", "row_to_unit")})
    member = F.one_hot(batch["row_to_unit"]).T.to(output.dtype)
    return (output - member @ batch["target"]).square().mean(1)


def sets(map_name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    rows = 12
    batch = {
        "image": torch.randn(rows, 3, 8, 8),
        "words": torch.randint(0, 7, (rows, 5)),
        "label": torch.randint(0, 5, (rows,)),
        "target": torch.logspace(-1, 1.5, rows)[:, None] * torch.randn(rows, 3),
        "row_to_unit": MAPS[map_name],
    }
    return Sets(), batch


@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize("method", OURS)
def test_units_of_several_rows(method: str, map_name: str) -> None:
    model, batch = sets(map_name)
    rows = batch["row_to_unit"]
    _, norms = clipped_sum(model, sets_loss, batch, 1.0, rows)
    threshold = float(norms.median())
    engine = attach(model, method, max_grad_norm=threshold)
    got = engine.accumulate(sets_loss, batch, rows)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    total = {name: p.grad for name, p in engine.parameters.items()}
    engine.detach()
    wanted, _ = clipped_sum(model, sets_loss, batch, threshold, rows, engine.groups)
    off = sum(float((total[name].double() - w).square().sum()) for name, w in wanted.items())  # type: ignore[union-attr]
    assert (off / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5 < 1e-5
    assert got is not None
    assert got.shape == (4,)
    torch.testing.assert_close(got.double(), norms, rtol=1e-5, atol=0)


def rows_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed loss of each unit's rows."""
    assert isinstance(batch, dict)
    ids = batch["row_to_unit"]
    losses = (model(batch["x"]) - batch["target"]).square().sum(1)
    return losses.new_zeros(int(ids.max()) + 1).index_add(0, ids, losses)


@pytest.mark.parametrize("method", OURS)
def test_units_that_have_more_rows_than_those_a_trial_takes(method: str) -> None:
    """A linear sees one position in the first two units, three in the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    rows = torch.tensor([0, 1, 2, 2, 3, 3, 3])
    batch = {"x": torch.randn(7, 6), "target": torch.randn(7, 3), "row_to_unit": rows}
    engine = attach(model, method, max_grad_norm=1.0)
    norms = engine.accumulate(rows_loss, batch, rows)
    engine.detach()
    assert norms is not None
    torch.testing.assert_close(norms.double(), clipped_sum(model, rows_loss, batch, 1.0, rows)[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", OURS)
def test_removing_a_unit_moves_the_sum_by_at_most_c(method: str) -> None:
    model, batch = sets("mixed")
    rows = batch["row_to_unit"]

    def total(chosen: Tensor) -> Tensor:
        part = {name: tensor[chosen] for name, tensor in batch.items()}
        part["row_to_unit"] = torch.unique(part["row_to_unit"], return_inverse=True)[1]
        engine = attach(model, method, max_grad_norm=0.3)
        engine.accumulate(sets_loss, part, part["row_to_unit"])
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        flat = torch.cat([p.grad.flatten() for p in engine.parameters.values()])  # type: ignore[union-attr]
        engine.detach()
        return flat

    everyone = total(rows >= 0)
    assert max(float((everyone - total(rows != unit)).norm()) for unit in range(4)) <= 0.3 * (1 + 1e-4)


@pytest.mark.parametrize("method", OURS)
def test_parameters_of_bf16_have_float32_masters(method: str) -> None:
    """Noise and sums live in float32; the model follows its masters at zero_grad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    batch = (torch.randn(5, 7, 6).bfloat16(), torch.randn(5, 3))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        x, target = batch  # type: ignore[misc]
        return (model(x).mean(1).float() - target).square().mean(1)

    _, wanted_norms = clipped_sum(model, loss_fn, batch, 0.1)
    engine = attach(model, method, max_grad_norm=0.1)
    optimizer = torch.optim.SGD(engine.parameters.values(), lr=1.0)
    norms = engine.accumulate(loss_fn, batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    assert norms is not None
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), wanted_norms, rtol=0.05, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in engine.parameters.values())
    total = {name: p.grad for name, p in engine.parameters.items()}
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    optimizer.step()
    engine.zero_grad()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        torch.testing.assert_close(parameter, (before[name] - total[name]).bfloat16())  # type: ignore[operator]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.peer])
def test_peers_refuse_units_and_half_precision(method: str) -> None:
    engine = attach(nn.Linear(2, 1), method)
    with pytest.raises(UsageError, match="every row for an example"):
        engine.accumulate(lambda m, b: m(b[0])[:, 0], (torch.ones(4, 2),), torch.tensor([0, 0, 1, 1]))  # type: ignore[index]
    with pytest.raises(UnsupportedModelError, match="use float32 parameters"):
        attach(nn.Linear(2, 1).bfloat16(), method)


@pytest.mark.parametrize(
    ("row_to_unit", "message"),
    [
        (torch.tensor([0, 0, 1]), "an integer tensor of shape"),
        (torch.tensor([0.0, 0.0, 1.0, 1.0]), "an integer tensor of shape"),
        (torch.tensor([0, 0, 2, 2]), "units numbered 0, 1, 2"),
        (torch.tensor([1, 0, 2, 3]), "sort the batch"),
    ],
)
def test_maps_that_are_none(row_to_unit: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Units.of(4, row_to_unit)


def test_a_leading_dimension_that_is_neither_rows_nor_units() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0].repeat(2, 1)).view(2, -1, 2).mean((0, 2))  # type: ignore[index]

    engine = attach(nn.Linear(2, 1), "bookkeeping")
    with pytest.raises(UnsupportedModelError, match="first dimension is 8, but there are 4 rows of 2 units"):
        engine.accumulate(loss_fn, (torch.ones(4, 2),), torch.tensor([0, 0, 1, 1]))
