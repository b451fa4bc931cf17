import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dit_dp.console import guarded
from dit_dp.data import digits, split
from dit_dp.errors import UsageError
from dit_dp.evaluate import (
    EvaluateArgs,
    Pictures,
    Recipe,
    SmallClassifier,
    downstream,
    downstream_accuracy,
    extract,
    fit,
    frechet_distance,
    kernel_distance,
    load_extractor,
    load_pictures,
    metrics,
    precision_recall,
    run_evaluate,
    save_features,
)
from dit_dp.evaluate.evaluate import evaluate
from dit_dp.sampling import save_images, save_npz

DOUBLE = torch.float64
QUICK = Recipe(num_steps=150, batch_size=64, width=8, learning_rate=5e-3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def of_moments(count: int, mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Return features whose sample mean and covariance are exactly these."""
    x = normal(count, len(mean), seed=seed)
    x = x - x.mean(0)
    own = torch.linalg.cholesky(x.T @ x / (count - 1))
    white = torch.linalg.solve_triangular(own, x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


# --- distances ----------------------------------------------------------------------------------------------------


def test_fid_of_two_gaussians() -> None:
    """With diagonal covariances the trace is a sum of squared differences of deviations; turning both keeps it."""
    mean, one, other = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE), [1.0, 4.0, 0.25], [2.0, 1.0, 0.25]
    expected = mean.square().sum().item() + sum(
        (math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(one, other, strict=True)
    )
    turn = torch.linalg.qr(normal(3, 3, seed=2)).Q
    generated = of_moments(50, turn @ mean, turn @ torch.diag(torch.tensor(one, dtype=DOUBLE)) @ turn.T)
    real = of_moments(
        80, torch.zeros(3, dtype=DOUBLE), turn @ torch.diag(torch.tensor(other, dtype=DOUBLE)) @ turn.T, 1
    )
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)


def test_fid_of_covariances_that_do_not_commute() -> None:
    """The trace of (S T)^(1/2) is that of the symmetric (S^(1/2) T S^(1/2))^(1/2), taken here by its eigenvalues."""
    a, b = normal(4, 4, seed=3), normal(4, 4, seed=4)
    one, other = a @ a.T + torch.eye(4), b @ b.T + torch.eye(4)
    values, vectors = torch.linalg.eigh(one)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).sqrt().sum()
    expected = (one.trace() + other.trace() - 2 * cross).item()
    zero = torch.zeros(4, dtype=DOUBLE)
    found = frechet_distance(of_moments(40, zero, one), of_moments(60, zero, other, seed=1))
    assert found == pytest.approx(expected, rel=1e-8)


def test_fid_of_the_same_features_is_0() -> None:
    x = normal(50, 5)
    assert abs(frechet_distance(x, x)) < 1e-9


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate with the cubic kernel, pair by pair."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    own = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return own + other - 2 * cross


def test_kid_is_the_squared_mmd() -> None:
    x, y = normal(12, 4), 0.5 * normal(12, 4, seed=1) + 1
    mean, deviation = kernel_distance(x, y, subset_size=50, num_subsets=3)
    assert mean == pytest.approx(squared_mmd(x, y), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kid_draws_its_subsets_by_seed_and_leaves_torch_s_generator() -> None:
    x, y = normal(30, 4), normal(30, 4, seed=1) + 0.1
    state = torch.get_rng_state()
    found = [kernel_distance(x, y, subset_size=10, num_subsets=5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert found[0] == found[1] != found[2]
    assert found[0][1] > 0


def test_precision_and_recall_by_hand() -> None:
    """Real: a line of points 1 apart; with k = 1 each ball has radius 1."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=DOUBLE)
    generated = torch.tensor([[0.5], [0.6], [10.0], [10.1], [3.9]], dtype=DOUBLE)
    # Generated balls: 0.1 around 0.5, 0.6, 10 and 10.1; 3.3 around 3.9, which has in it all but 0.
    assert precision_recall(generated, real, neighbours=1) == (3 / 5, 3 / 4)
    assert precision_recall(real, real, neighbours=1) == (1, 1)


@pytest.mark.parametrize("count", [250, 70])
def test_precision_and_recall_in_parts_are_those_of_the_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", 100)
    real, generated = normal(210, 3), 1.5 * normal(count, 3, seed=1)
    found = precision_recall(generated, real, neighbours=3)

    def fraction(x: Tensor, centres: Tensor) -> float:
        own = torch.cdist(centres, centres)
        radii = own.sort(1).values[:, 3]  # the first is itself
        return (torch.cdist(x, centres) <= radii).any(1).double().mean().item()

    assert found == (fraction(generated, real), fraction(real, generated))
    assert found[0] < found[1]


def test_a_collapsed_model_has_precision_without_recall() -> None:
    real = normal(300, 4)
    precision, recall = precision_recall(0.05 * normal(300, 4, seed=1), real)
    assert precision > 0.99
    assert recall < 0.05


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UsageError, match=r"samples: got '5 images'; accepted: at least 6.*KID does not"):
        frechet_distance(normal(5, 5), normal(50, 5))
    with pytest.raises(UsageError, match="reference"):
        frechet_distance(normal(50, 5), normal(5, 5))
    with pytest.raises(UsageError, match="kid_subset_size"):
        kernel_distance(normal(1, 5), normal(5, 5))
    with pytest.raises(UsageError, match="at least 4"):
        precision_recall(normal(3, 5), normal(5, 5))
    with pytest.raises(UsageError, match="two sets of features"):
        precision_recall(normal(5, 4), normal(5, 5))


# --- extractors ---------------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Channel means of 8-bit images, as a published extractor would be scripted."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        features = x.to(torch.float32).mean((2, 3), keepdim=True) / 255
        return features if return_features else features.sum() * torch.ones(1)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5].double()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_extractors(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (7, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extract(load_extractor(scripted(Means(), tmp_path / "means.pt")), pixels, batch_size=3)
    torch.testing.assert_close(found, (pixels.double().mean((2, 3)) / 255).expand(7, 3), rtol=1e-6, atol=1e-6)
    plain = extract(load_extractor(scripted(Plain(), tmp_path / "plain.torchscript")), pixels)
    torch.testing.assert_close(plain, pixels.flatten(1)[:, :5].double())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_classifier_s_features(channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SmallClassifier(channels, 4, width=2).eval()
    save_features(model, tmp_path / "cnn.safetensors")
    pixels = torch.randint(0, 256, (5, channels, 12, 12), dtype=torch.uint8)
    found = extract(load_extractor(tmp_path / "cnn.safetensors"), pixels, batch_size=2)
    with torch.no_grad():
        expected = model.features(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
    assert found.shape == (5, model.num_features)


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "broken.pt").write_bytes(b"not an archive")
    (tmp_path / "broken.safetensors").write_bytes(b"nor this")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    for name, words in [
        ("absent.pt", "exists"),
        ("net.onnx", "safetensors"),
        ("broken.pt", "TorchScript"),
        ("pickle.pt", "TorchScript"),
        ("broken.safetensors", "cannot read"),
        ("other.safetensors", "save_features"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            load_extractor(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_extractors_that_return_no_features_are_refused() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("a trace\n  of lines\n  wrong size")

    for extractor, words in [
        (lambda x: x.float().sum().view(1), "returns"),
        (lambda x: torch.full((2, 3), math.nan), "finite"),
        (failing, "wrong size"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            extract(extractor, pixels)
        assert "\n" not in str(caught.value)


# --- pictures -----------------------------------------------------------------------------------------------------


def write(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_an_npz_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    path = save_npz(pixels.float() / 127.5 - 1, tmp_path / "samples.npz", torch.arange(6))
    found = load_pictures("samples", str(path))
    assert torch.equal(found.pixels, pixels)
    assert found.labels is not None
    assert found.labels.tolist() == list(range(6))
    assert load_pictures("samples", str(path), channels=1).pixels.shape == (6, 1, 4, 4)


def test_folders_of_samples(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (12, 1, 5, 5), dtype=torch.uint8)
    labels = torch.arange(12)
    save_images(pixels.float() / 127.5 - 1, tmp_path / "images", labels)
    found = load_pictures("samples", str(tmp_path / "images"))
    assert found.labels is not None
    assert torch.equal(found.pixels[found.labels.argsort()], pixels.repeat(1, 3, 1, 1))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(pixels[0, 0].numpy()).save(flat / "a.png")
    single = load_pictures("samples", str(flat), channels=1)
    assert torch.equal(single.pixels, pixels[:1])
    with pytest.raises(UsageError, match="images with labels"):
        single.labelled("samples")


def test_bundled_data_and_their_sides() -> None:
    _, test = split(digits(size=8), 0.2)
    found = load_pictures("test", "digits:test", channels=1)
    assert found.pixels.shape == (len(test), 1, 8, 8)
    assert len(load_pictures("samples", "digits")) == 1797
    assert load_pictures("test", "digits:test", size=16).pixels.shape == (len(test), 3, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "uint8 of shape"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "uint8 of shape"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "at least 1"),
        ({"samples": np.zeros((2, 4, 4, 3), np.uint8)}, "no arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "arr_1"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "integers"),
        ({"arr_0": np.array([{}], dtype=object)}, "cannot read"),
    ],
)
def test_npz_of_another_kind_are_refused(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_pictures("samples", write(tmp_path / "samples.npz", **arrays))
    assert "\n" not in str(caught.value)


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "empty").mkdir()
    good = write(tmp_path / "good.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    for source, size, words in [
        (str(tmp_path / "absent.npz"), None, "No such file"),
        (str(tmp_path / "broken.npz"), None, "cannot read"),
        (str(tmp_path / "empty"), None, "a folder with images"),
        ("imagenet", None, "mnist, digits"),
        (good, 8, "images 8 wide"),
        (f"{good}:test", None, "as a whole"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            load_pictures("samples", source, size=size)
        assert "\n" not in str(caught.value)


# --- downstream ---------------------------------------------------------------------------------------------------


def test_real_digits_teach_a_classifier_and_noise_does_not() -> None:
    train, test = load_pictures("samples", "digits:train"), load_pictures("test", "digits:test")
    accuracy = downstream_accuracy(train, test, recipe=QUICK)
    assert accuracy.cnn > 0.9
    assert accuracy.logistic > 0.9
    assert (accuracy.num_samples, accuracy.num_test) == (len(train), len(test))
    noise = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    useless = Pictures(source="noise", pixels=noise, labels=torch.arange(200) % 10)
    found = downstream_accuracy(useless, test, recipe=dataclasses.replace(QUICK, num_steps=20))
    assert max(found.cnn, found.logistic) < 0.35


def test_a_fit_is_the_same_every_time_and_draws_nothing_of_torch_s() -> None:
    data = load_pictures("samples", "digits:test")
    state = torch.get_rng_state()
    few = dataclasses.replace(QUICK, num_steps=3)
    models = [fit(data.pixels, data.labelled("samples"), 10, recipe=few, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    one, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_data_that_teach_nothing_are_refused() -> None:
    test = load_pictures("test", "digits:test")
    one_class = dataclasses.replace(test, labels=torch.zeros(len(test), dtype=torch.int64))
    with pytest.raises(UsageError, match="two classes"):
        downstream_accuracy(one_class, test)
    with pytest.raises(UsageError, match="images with labels"):
        downstream_accuracy(dataclasses.replace(test, labels=None), test)
    smaller = Pictures(source="x", pixels=test.pixels[:, :, :4, :4], labels=test.labels)
    with pytest.raises(UsageError, match="samples' shape"):
        downstream_accuracy(smaller, test)


# --- the command --------------------------------------------------------------------------------------------------


def test_everything_at_once(tmp_path: Path) -> None:
    data = load_pictures("samples", "digits:train")
    features = fit(data.pixels, data.labelled("samples"), 10, recipe=dataclasses.replace(QUICK, num_steps=20, width=4))
    save_features(features, tmp_path / "cnn.safetensors")
    args = EvaluateArgs(
        samples="digits:train",
        reference="digits:test",
        test="digits:test",
        features=tmp_path / "cnn.safetensors",
        kid_subset_size=100,
        kid_subsets=5,
        output=tmp_path / "new" / "result.json",
    )
    assert args.chosen == ("fid", "kid", "precision_recall", "downstream")
    found = run_evaluate(args, recipe=dataclasses.replace(QUICK, num_steps=20))
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == dataclasses.asdict(found)
    assert all(value is not None for value in dataclasses.asdict(found).values())
    assert found.num_features == 16
    assert found.fid is not None
    assert 0 < found.fid < frechet_distance(normal(50, 16), 10 + normal(50, 16))
    assert "not private" in found.describe()
    assert f"FID: {found.fid:.5g}" in found.describe()


def test_only_what_was_asked_for_is_computed() -> None:
    quick = dataclasses.replace(QUICK, num_steps=2)
    found = run_evaluate(EvaluateArgs(samples="digits:train", test="digits:test"), recipe=quick)
    assert found.cnn_accuracy is not None
    assert (found.fid, found.kid, found.precision, found.num_features) == (None, None, None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--test for downstream"),
        ({"reference": "mnist"}, "--features"),
        ({"metrics": ("fid",), "reference": "mnist"}, "features.*fid needs"),
        ({"metrics": ("downstream",)}, "test.*downstream needs"),
        ({"metrics": ("inception",), "test": "mnist"}, "metrics"),
        ({"test": "mnist", "test_fraction": 1.0}, "test_fraction"),
        ({"test": "mnist", "neighbours": 0}, "neighbours"),
    ],
)
def test_questions_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EvaluateArgs(samples="digits", **options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downstream, "fit", lambda *a, **k: fit(*a, **{**k, "recipe": Recipe(num_steps=1, width=2)}))
    line = ["digits:train", "--test", "digits:test", "--output", str(tmp_path / "result.json")]
    assert guarded(EvaluateArgs, line, "dit-dp evaluate", evaluate, name="dit-dp") == 0
    out = capsys.readouterr().out
    assert "tested on 347 real images of digits:test: CNN" in out
    assert "not private" in out
    assert json.loads((tmp_path / "result.json").read_text())["num_test"] == 347


@pytest.mark.parametrize(
    "line",
    [
        ["absent.npz", "--test", "digits"],
        ["digits"],
        ["digits", "--test", "digits", "--metrics", "inception"],
        ["digits", "--reference", "digits", "--features", "absent.pt"],
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(EvaluateArgs, line, "dit-dp evaluate", evaluate, name="dit-dp") == 2
    said = capsys.readouterr()
    assert said.err.startswith("dit-dp: error: ")
    assert said.err.count("\n") == 1
    assert not said.out


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(UsageError, match="output"):
            run_evaluate(EvaluateArgs(samples="absent.npz", test="digits", output=output))
