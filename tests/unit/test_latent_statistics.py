import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_dp.data import ImageSet, sets_of
from dit_dp.errors import UsageError
from dit_dp.frontends import (
    LatentStatistics,
    PrivateStatistics,
    fit_statistics,
    load_statistics,
    save_statistics,
)
from dit_dp.frontends import statistics as module
from dit_dp.privacy import Mechanism, epsilon


def latents_of(x: Tensor) -> ImageSet:
    labels = torch.zeros(len(x), dtype=torch.int64)
    return ImageSet(x=x, labels=labels, num_classes=1, channels=x.shape[1], size=x.shape[-1])


def random_latents(count: int, seed: int = 0) -> ImageSet:
    """Return latents whose five channels have other means and scales."""
    x = torch.randn(count, 5, 3, 3, generator=torch.Generator().manual_seed(seed))
    scale, shift = torch.linspace(0.5, 1.0, 5).view(5, 1, 1), torch.linspace(-0.5, 0.5, 5).view(5, 1, 1)
    return latents_of(x * scale + shift)


def test_public_statistics_are_the_mean_and_the_variance_of_each_channel() -> None:
    latents = random_latents(50)
    found = fit_statistics(latents, public=True, batch_size=7)
    assert torch.allclose(found.mean, latents.x.mean((0, 2, 3)).view(5, 1, 1), atol=1e-6)
    assert torch.allclose(found.var, latents.x.var((0, 2, 3), correction=0).view(5, 1, 1), atol=1e-6)
    assert (found.noise_multiplier, found.mechanism) == (None, None)


def test_private_statistics_have_to_be_asked_for_by_name(tmp_path: Path) -> None:
    latents = random_latents(8)
    message = r"^private: got None; accepted: PrivateStatistics\(noise_multiplier=\.\.\.\), or public=True.*charged$"
    with pytest.raises(UsageError, match=message):
        fit_statistics(latents)
    with pytest.raises(UsageError, match=r"^private: got PrivateStatistics.*not both"):
        fit_statistics(latents, public=True, private=PrivateStatistics(noise_multiplier=1.0))
    sets = sets_of(latents, tmp_path / "sets.json", set_size=2, remainder="drop")
    with pytest.raises(UsageError, match=r"^latents: got 'ImageSets'; accepted: images; of sets, statistics must be"):
        fit_statistics(sets, private=PrivateStatistics(noise_multiplier=1.0))  # type: ignore[arg-type]
    for values in ({"noise_multiplier": 0}, {"noise_multiplier": -1.0}, {"noise_multiplier": 1.0, "max_rms": 0}):
        with pytest.raises(UsageError, match=r"accepted: a finite number > 0$"):
            PrivateStatistics(**values)  # type: ignore[arg-type]


def test_private_statistics_cost_one_gaussian_mechanism() -> None:
    private = PrivateStatistics(noise_multiplier=4.0)
    found = fit_statistics(random_latents(8), private=private)
    wanted = Mechanism(noise_multiplier=4.0, sample_rate=1.0, num_steps=1)
    assert found.mechanism == private.mechanism == wanted
    # Balle and Wang (arXiv 1805.06530), Theorem 8: the delta of a Gaussian mechanism of sigma 4 at this epsilon.
    spent, normal = epsilon(wanted, 1e-5), NormalDist()
    delta = normal.cdf(1 / 8 - 4 * spent) - math.exp(spent) * normal.cdf(-1 / 8 - 4 * spent)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_private_statistics_come_close_with_many_images() -> None:
    latents = random_latents(20_000)
    private = PrivateStatistics(noise_multiplier=1.0, max_rms=2.0)
    found = fit_statistics(latents, private=private, batch_size=5000, generator=torch.Generator().manual_seed(0))
    exact = fit_statistics(latents, public=True, batch_size=5000)
    # Noise of standard deviation sqrt(3) in units of a bound of at most 4 sqrt(5), divided by 20,000; six of it.
    noise = 6 * 3**0.5 * 4 * 5**0.5 / 20_000
    assert (found.mean - exact.mean).abs().max() < noise
    assert (found.var - exact.var).abs().max() < 3 * noise
    assert not torch.equal(found.mean, exact.mean)
    again = fit_statistics(latents, private=private, batch_size=5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.mean, found.mean)
    system = [fit_statistics(latents.subset(range(5)), private=private).mean for _ in range(2)]
    assert not torch.equal(*system)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3, 1e18, 1e30, float("inf"), float("nan")])
def test_an_image_moves_the_sum_by_at_most_its_bound(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[Tensor] = []
    whole = module._from_total

    def seen(total: Tensor, private: PrivateStatistics | None) -> LatentStatistics:
        totals.append(total.clone())
        return whole(total, private)

    monkeypatch.setattr(module, "_from_total", seen)
    without = random_latents(4)
    image = torch.randn(1, 5, 3, 3, generator=torch.Generator().manual_seed(5)) * scale
    for latents in (without, latents_of(torch.cat([without.x, image]))):
        fit_statistics(
            latents,
            private=PrivateStatistics(noise_multiplier=2.0),
            batch_size=3,
            generator=torch.Generator().manual_seed(1),
        )
    moved = float((totals[1] - totals[0]).norm())
    assert 1 - 1e-12 <= moved <= 3**0.5 * (1 + 1e-12)
    assert (scale < 1e3) or moved == pytest.approx(3**0.5 if scale < 1e31 else 1.0)


def test_the_noise_has_the_standard_deviation_that_is_charged_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = module._noise(100_000, 2.5, torch.Generator().manual_seed(0))
    # The standard deviation of n draws is off by one part in sqrt(2 n), 0.22 %; four of it.
    assert float(drawn.std()) == pytest.approx(2.5 * 3**0.5, rel=0.009)


def test_statistics_of_no_image_are_noise_and_no_error() -> None:
    found = fit_statistics(random_latents(0), private=PrivateStatistics(noise_multiplier=1.0))
    assert torch.isfinite(found.mean).all()
    assert (found.var >= 1e-4 * (1 - 1e-6)).all()


def test_a_file_says_what_its_statistics_cost(tmp_path: Path) -> None:
    latents = random_latents(20)
    for options in ({"public": True}, {"private": PrivateStatistics(noise_multiplier=1.5)}):
        found = fit_statistics(latents, **options)  # type: ignore[arg-type]
        save_statistics(found, tmp_path / "statistics.safetensors")
        loaded = load_statistics(tmp_path / "statistics.safetensors")
        assert torch.equal(loaded.mean, found.mean)
        assert torch.equal(loaded.var, found.var)
        assert loaded.mechanism == found.mechanism
    with pytest.raises(UsageError, match=r"^statistics: cannot write .*nowhere/x: No such file or directory$"):
        save_statistics(found, tmp_path / "nowhere" / "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": torch.zeros(3), "var": torch.zeros(4)}, r"^statistics: got \(\(3,\), \(4,\)\); accepted: mean and v"),
        ({"mean": torch.zeros(3, 3), "var": torch.zeros(3, 3)}, r"^statistics: got .*of one shape"),
        ({"mean": torch.full((3,), float("nan")), "var": torch.ones(3)}, r"^statistics: .*not finite"),
        ({"mean": torch.zeros(3), "var": torch.full((3,), float("inf"))}, r"^statistics: .*not finite"),
    ],
)
def test_numbers_that_are_no_statistics_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LatentStatistics(**values)
