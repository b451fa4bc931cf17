"""Poisson sampling is what it says: rates, independence, and shares that are one sample."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from dit_dp.errors import UsageError
from dit_dp.privacy import KEY_SIZE, PoissonSampler, ShuffledSampler
from dit_dp.privacy import sampling as module

KEY = bytes(range(KEY_SIZE))


def memberships(num_units: int, rate: float, count: int, entropy: bytes = KEY) -> np.ndarray:
    """Return (count, num_units) whether each unit was in each sample."""
    sampler = PoissonSampler(num_units, rate, entropy=entropy)
    found = np.zeros((count, num_units), dtype=bool)
    for row in found:
        row[sampler.draw().numpy()] = True
    return found


@pytest.mark.parametrize("rate", [0.003, 0.25, 1 / 3, 0.9])
def test_each_unit_is_in_a_sample_as_often_as_the_rate_says(rate: float) -> None:
    count, num_units = 4000, 200
    found = memberships(num_units, rate, count)
    error = math.sqrt(rate * (1 - rate) / count)
    # 6 standard errors: the largest of 200 is beyond them with probability 4e-7
    assert np.abs(found.mean(0) - rate).max() < 6 * error
    assert abs(found.mean() - rate) < 6 * error / math.sqrt(num_units)


def test_units_and_samples_are_independent_in_pairs() -> None:
    count, num_units, rate = 4000, 60, 0.2
    deviations = (memberships(num_units, rate, count) - rate) / math.sqrt(rate * (1 - rate))
    units = (deviations.T @ deviations) / count
    samples = (deviations[:500] @ deviations[:500].T) / num_units
    off = ~np.eye(num_units, dtype=bool)
    # 1770 pairs of correlation 0 with standard error 1 / sqrt(count); likewise samples, of which there are more
    assert np.abs(units[off]).max() < 6 / math.sqrt(count)
    assert abs(samples[np.triu_indices(500, 1)].std() - 1 / math.sqrt(num_units)) < 0.01


def test_the_size_of_a_sample_is_binomial() -> None:
    sizes = memberships(1000, 0.01, 4000).sum(1)
    mean, variance = 10.0, 9.9
    assert abs(sizes.mean() - mean) < 6 * math.sqrt(variance / 4000)
    assert abs(sizes.var() / variance - 1) < 6 * math.sqrt(2 / 4000)  # fixed sizes would have variance 0


def test_bits_that_do_not_decide_are_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate of half a 65536th is decided by the second bits alone."""
    rate = 2.0**-17
    found = sum(len(PoissonSampler(1 << 20, rate, entropy=bytes([i]) * KEY_SIZE).draw()) for i in range(40))
    expected = 40 * (1 << 20) * rate  # 320
    assert abs(found - expected) < 6 * math.sqrt(expected)
    sampler = PoissonSampler(10, 0.5 + 2.0**-60, entropy=KEY)
    assert (sampler._first, sampler._second) == (1 << 15, 0)  # as near as a float of that size is
    # first bits equal to the threshold's, second ones on either side of it
    streams = {0: bytes([0, 64]) * 4, 1: b"".join(n.to_bytes(8, "little") for n in (0, 4, 5, 9))}
    sampler = PoissonSampler(4, 0.25 + 5 * 2.0**-50, entropy=KEY)
    assert sampler._second == 5 << 30
    monkeypatch.setattr(sampler, "_stream", lambda draw, start, level, size: streams[level][:size])
    assert len(sampler.draw()) == 4
    monkeypatch.setattr(sampler, "_second", 5)
    assert sampler.draw().tolist() == [0, 1]


def test_everybody_at_rate_one_and_nobody_below_the_smallest() -> None:
    assert PoissonSampler(7, 1.0).draw().tolist() == list(range(7))
    assert PoissonSampler(7, 1).draw(1, 2).tolist() == [1, 3, 5]
    assert PoissonSampler(100_000, 1e-30).draw().tolist() == []
    assert len(PoissonSampler(100_000, math.nextafter(1, 0)).draw()) == 100_000


@pytest.mark.parametrize("num_units", [1, 2, 999, 1000, 1001, 2999])
def test_chunks_change_nothing_but_the_memory(num_units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1000)
    found = [PoissonSampler(num_units, 0.5).draw() for _ in range(40)]
    assert all(torch.equal(index, index.unique(sorted=True)) for index in found)
    assert all(index.tolist() == [i for i in index.tolist() if 0 <= i < num_units] for index in found)
    total = sum(map(len, found))
    assert abs(total - 20 * num_units) <= 6 * math.sqrt(10 * num_units)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "kind", [lambda: PoissonSampler(50, 0.1, entropy=KEY), lambda: ShuffledSampler(50, 12, entropy=KEY)]
)
def test_the_ranks_shares_are_the_sample_of_one(kind: Any, world_size: int) -> None:
    alone, ranks = kind(), [kind() for _ in range(world_size)]
    for _ in range(30):
        whole = alone.draw()
        shares = [sampler.draw(rank, world_size) for rank, sampler in enumerate(ranks)]
        assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(share.dtype == torch.int64 and share.is_contiguous() for share in shares)


def test_entropy_is_the_systems_and_every_bit_of_it_counts() -> None:
    def draws(entropy: bytes | None) -> list[list[int]]:
        sampler = PoissonSampler(200, 0.5, entropy=entropy)
        return [sampler.draw().tolist() for _ in range(3)]

    assert draws(KEY) == draws(KEY)
    assert draws(KEY)[0] != draws(KEY)[1]
    assert draws(KEY) != draws(KEY[:-1] + bytes([KEY[-1] ^ 1]))
    assert draws(None) != draws(None)


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_sampler_is_never_saved(save: Any) -> None:
    for sampler in (PoissonSampler(5, 0.5), ShuffledSampler(5, 2)):
        with pytest.raises(TypeError, match="never saved"):
            save(sampler)


def test_fixed_batches_are_an_epoch_without_an_account() -> None:
    sampler = ShuffledSampler(10, 3)
    epochs = [torch.cat([sampler.draw() for _ in range(3)]).tolist() for _ in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert ShuffledSampler.accounting is None
    assert PoissonSampler.accounting == "poisson"
    assert (sampler.expected_batch_size, PoissonSampler(50, 0.1).expected_batch_size) == (3, 5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PoissonSampler(0, 0.5), "num_units"),
        (lambda: PoissonSampler(10, 0.0), "sample_rate"),
        (lambda: PoissonSampler(10, 1.1), "sample_rate"),
        (lambda: PoissonSampler(10, math.nan), "sample_rate"),
        (lambda: PoissonSampler(10, 0.5, entropy=b"short"), "entropy"),
        (lambda: ShuffledSampler(10, 11), "batch_size"),
        (lambda: ShuffledSampler(10, 0), "batch_size"),
        (lambda: PoissonSampler(10, 0.5).draw(2, 2), "rank"),
        (lambda: PoissonSampler(10, 0.5).draw(0, 0), "world_size"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: got "):
        make()
