"""The noise's generator: every bit of its entropy counts."""

import random
import secrets

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.noise import MT19937_WORDS, entropy_size, generator_of

CPU = torch.device("cpu")


def test_the_whole_state_is_the_entropy() -> None:
    entropy = secrets.token_bytes(entropy_size(CPU))
    words = np.frombuffer(entropy, dtype=np.uint32)
    twister = np.random.RandomState()
    twister.set_state(("MT19937", words, MT19937_WORDS))
    drawn = torch.empty(3 * MT19937_WORDS, dtype=torch.int32).random_(generator=generator_of(entropy, CPU))
    assert drawn.numpy().tolist() == twister.randint(0, 2**31, size=3 * MT19937_WORDS).tolist()


def test_it_draws_standard_normals() -> None:
    drawn = torch.empty(100_000).normal_(generator=generator_of(secrets.token_bytes(entropy_size(CPU)), CPU))
    # 7 standard errors of the mean (1 / sqrt(n)) and of the standard deviation (1 / sqrt(2 n))
    assert abs(float(drawn.mean())) < 7 / 100_000**0.5
    assert abs(float(drawn.std()) - 1) < 7 / 200_000**0.5


def test_a_wrong_amount_of_entropy_is_refused() -> None:
    with pytest.raises(ValueError, match="got 8 bytes; expected 2496 for cpu"):
        generator_of(bytes(8), CPU)


def own_noise(monkeypatch: pytest.MonkeyPatch, last_byte: int) -> Tensor:
    monkeypatch.setattr(secrets, "token_bytes", lambda size: random.Random(0).randbytes(size - 1) + bytes([last_byte]))
    model = nn.Linear(30, 30)
    engine = attach(model, "bookkeeping", max_grad_norm=1.0)
    engine.accumulate(lambda model, batch: model(batch[0]).sum(1), (torch.zeros(0, 30),))
    engine.privatize(noise_multiplier=1.0, expected_batch_size=1)
    assert model.weight.grad is not None
    return model.weight.grad


def test_an_engine_uses_more_than_a_seed_of_its_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`manual_seed` on CPU would make of both the same stream."""
    same = own_noise(monkeypatch, 1)
    assert torch.equal(own_noise(monkeypatch, 1), same)
    assert not torch.equal(own_noise(monkeypatch, 2), same)
