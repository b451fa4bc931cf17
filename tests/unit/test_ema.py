import pytest
import torch
from torch import nn

from dit_dp.errors import UsageError
from dit_dp.training import Ema


def test_averages_follow_the_formula_in_float32_and_in_place() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4).to(torch.bfloat16))]
    ema = Ema(parameters, 0.75)
    places, wanted = [t.data_ptr() for t in ema.tensors], [p.detach().float().clone() for p in parameters]
    for _ in range(3):
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.add_(1)
                wanted[index] = 0.75 * wanted[index] + 0.25 * parameter.float()
        ema.update()
    for got, exact in zip(ema.tensors, wanted, strict=True):
        torch.testing.assert_close(got, exact)
        assert got.dtype == torch.float32
        assert not got.requires_grad
    assert [t.data_ptr() for t in ema.tensors] == places


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(UsageError, match=r"^ema_decay: got "):
        Ema([nn.Parameter(torch.ones(1))], decay)
