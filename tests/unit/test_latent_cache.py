import errno
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit_dp.data import image_folder, sets_of, split, synthetic
from dit_dp.errors import UsageError
from dit_dp.frontends import CachedLatents, encode_data, open_cache
from tests.latents import Halving, image_set, write_folder

COUNT = 11
SHARD_BYTES = 3 * 4 * 4 * 4 * 4
"""Three latents of (4, 4, 4) float32 in a shard: four shards, the last one with two."""


@pytest.fixture(scope="module")
def halving() -> Halving:
    return Halving()


def cached(folder: Path, frontend: Halving, count: int = COUNT, **options: object) -> CachedLatents:
    """Encode images into a folder, in batches that shards do not consist of."""
    return encode_data(image_set(count), frontend, folder, 2, **{"shard_bytes": SHARD_BYTES, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(folder: Path, number: int) -> Path:
    (found,) = folder.glob(f"shard-{number:05d}-*.safetensors")
    return found


def refused(call: Callable[[], object], message: str) -> None:
    """Check that a call is refused in one line."""
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_latents_are_what_the_front_end_makes_of_each_image(tmp_path: Path, halving: Halving) -> None:
    images = image_set(COUNT)
    latents = cached(tmp_path / "deep" / "cache", halving)
    wanted = halving.encode(images.x)
    index = torch.tensor([10, 0, 7, 7, 2])
    x, labels = latents.take(index)
    assert (x.dtype, x.shape, latents.channels, latents.size) == (torch.float32, (5, 4, 4, 4), 4, 4)
    assert torch.allclose(x, wanted[index], rtol=0, atol=1e-6)
    assert torch.equal(labels, images.labels[index])
    assert (len(latents), latents.num_classes) == (COUNT, 3)
    assert latents.take(torch.tensor([], dtype=torch.int64))[0].shape == (0, 4, 4, 4)
    assert latents.rows(4, torch.Generator().manual_seed(0))[0].shape == (4, 4, 4, 4)
    assert len(list((tmp_path / "deep" / "cache").glob("shard-*"))) == 4


def test_a_cache_stands_for_its_images_in_splits_and_sets(tmp_path: Path, halving: Halving) -> None:
    images = image_set(40)
    latents = cached(tmp_path / "cache", halving, 40)
    assert latents.digests() == images.digests()
    assert latents.digest == images.digest
    for ours, theirs in zip(split(latents, 0.3), split(images, 0.3), strict=True):
        assert ours.digests() == theirs.digests()
        everything = torch.arange(len(theirs))
        assert torch.allclose(ours.take(everything)[0], halving.encode(theirs.x), rtol=0, atol=1e-6)
        assert torch.equal(ours.take(everything)[1], theirs.labels)
    sets = sets_of(images, tmp_path / "sets.json", set_size=3, remainder="drop")
    of_latents = sets_of(latents, tmp_path / "sets.json", set_size=3, remainder="drop")
    wanted = halving.encode(sets.take(torch.tensor([1]))[0][0])
    assert torch.allclose(of_latents.take(torch.tensor([1]))[0][0], wanted, rtol=0, atol=1e-6)


def test_a_finished_cache_is_read_and_not_encoded_again(tmp_path: Path, halving: Halving) -> None:
    first = cached(tmp_path, halving)
    before, calls = contents(tmp_path), halving.calls
    again = cached(tmp_path, halving, shard_bytes=1)
    assert (contents(tmp_path), halving.calls) == (before, calls)
    everything = torch.arange(COUNT)
    for other in (again, open_cache(tmp_path), pickle.loads(pickle.dumps(first))):
        assert torch.equal(other.take(everything)[0], first.take(everything)[0])
        assert other.digest == first.digest


def test_a_finished_cache_needs_no_right_to_write(
    tmp_path: Path, halving: Halving, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path, halving)
    monkeypatch.setattr("dit_dp.frontends.cache._alone_in", None)
    monkeypatch.setattr("dit_dp.frontends.cache.write_whole", None)
    assert len(cached(tmp_path, halving)) == COUNT


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_latents_may_be_stored_in_fewer_bits(tmp_path: Path, halving: Halving, dtype: str, tolerance: float) -> None:
    latents = cached(tmp_path, halving, dtype=dtype)
    wanted = halving.encode(image_set(COUNT).x)
    x, _ = latents.take(torch.arange(COUNT))
    assert x.dtype == torch.float32
    assert not torch.equal(x, wanted)
    assert ((x - wanted).abs() <= tolerance * wanted.abs() + 1e-6).all()
    assert load_file(shard(tmp_path, 0))["latents"].element_size() == 2


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_killed_process_is_gone_on_from(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cached(whole, Halving())

    class Dying(Halving):
        """Ends the process, so to speak, after some shards of two batches each."""

        def _encode(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            if self.calls == 2 * left:
                raise KeyboardInterrupt
            return super()._encode(x, generator)

    with pytest.raises(KeyboardInterrupt):
        cached(broken, Dying())
    assert len(list(broken.glob("shard-*"))) == left
    for name in (".shard-00001-0.safetensors.1.tmp", ".rows.safetensors.2.tmp", ".manifest.json.3.tmp"):
        (broken / name).write_bytes(b"half a file")
    refused(lambda: open_cache(broken), rf"^latent_cache: .*broken has no shard {left} of 4; encode_data makes")
    caplog.set_level(logging.INFO)
    kept = {name: (broken / name).stat().st_mtime_ns for name in contents(broken) if name.startswith("shard")}
    frontend = Halving()
    cached(broken, frontend)
    assert contents(broken) == contents(whole)
    assert all((broken / name).stat().st_mtime_ns == then for name, then in kept.items())
    assert frontend.calls == 7 - 2 * left
    assert (f"{left} of 4 shards are there already" in caplog.text) == (left > 0)


def test_a_process_that_is_killed_outright_leaves_whole_shards(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tests.latents import Halving, image_set\n"
        "import dit_dp.frontends.cache as cache\n"
        "write = cache.write_whole\n"
        "def write_whole(file, content):\n"
        "    if file.name.startswith('shard-00002'):\n"
        "        file.with_name(f'.{file.name}.9.tmp').write_bytes(content[:40]); os.kill(os.getpid(), 9)\n"
        "    write(file, content)\n"
        "cache.write_whole = write_whole\n"
        f"cache.encode_data(image_set({COUNT}), Halving(), Path(sys.argv[1]), 2, shard_bytes={SHARD_BYTES})\n"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert ended.returncode == -9
    assert len(list(tmp_path.glob("shard-*"))) == 2
    latents = cached(tmp_path, Halving())
    wanted = Halving().encode(image_set(COUNT).x)
    assert torch.allclose(latents.take(torch.arange(COUNT))[0], wanted, rtol=0, atol=1e-6)
    assert not list(tmp_path.glob("*.tmp"))


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("change", [altered, truncated])
def test_a_shard_that_is_not_what_it_was_is_refused_and_made_anew_once_deleted(
    tmp_path: Path, halving: Halving, change: Callable[[Path], None]
) -> None:
    whole = cached(tmp_path, halving).take(torch.arange(COUNT))[0]
    path = shard(tmp_path, 2)
    change(path)
    before = contents(tmp_path)
    for call in (lambda: cached(tmp_path, halving), lambda: open_cache(tmp_path)):
        refused(call, r"shard-00002-.* was truncated or altered, or is of another cache; delete it, and encode_data")
    assert contents(tmp_path) == before
    path.unlink()
    assert torch.equal(cached(tmp_path, halving).take(torch.arange(COUNT))[0], whole)


def test_a_shard_of_another_cache_or_another_number_is_refused(tmp_path: Path, halving: Halving) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    cached(ours, halving)
    cached(theirs, Halving(seed=1))
    stranger = shard(theirs, 1)
    shard(ours, 1).unlink()
    (ours / stranger.name).write_bytes(stranger.read_bytes())
    refused(lambda: open_cache(ours), r"shard-00001-.* is of another cache")
    (ours / stranger.name).unlink()
    first = shard(ours, 0)
    (ours / first.name.replace("shard-00000", "shard-00001")).write_bytes(first.read_bytes())
    refused(lambda: open_cache(ours), r"shard-00001-.* is of another cache")


def test_a_shard_that_goes_while_it_is_used_is_named(tmp_path: Path, halving: Halving) -> None:
    latents = cached(tmp_path, halving)
    truncated(shard(tmp_path, 3))
    refused(lambda: latents.take(torch.tensor([9])), r"^latent_cache: cannot read .*shard-00003-")
    shard(tmp_path, 0).unlink()
    refused(lambda: latents.take(torch.tensor([0])), r"^latent_cache: cannot read .*shard-00000-")
    assert latents.take(torch.tensor([4]))[0].shape == (1, 4, 4, 4)


def test_a_cache_of_anything_else_is_refused_by_the_name_of_what_differs(tmp_path: Path, halving: Halving) -> None:
    cached(tmp_path, halving)
    before = contents(tmp_path)
    images = image_set(COUNT)
    relabelled = replace(images, labels=images.labels.flip(0))

    def encode(**changes: object) -> Callable[[], object]:
        given = {"images": images, "frontend": halving, "folder": tmp_path, **changes}
        return lambda: encode_data(**given)  # type: ignore[arg-type]

    others = {
        "data": encode(images=image_set(COUNT, seed=1)),
        "data: .*the images, their order or their labels are others": encode(images=relabelled),
        "data.*also: num_images": encode(images=images.subset(range(5))),
        "image_size: got 4; accepted: 8,.*also: size": encode(images=replace(images, size=4)),
        "weights: .*other weights": encode(frontend=Halving(seed=1)),
        r"settings: got \{'scale': '2.0'\}; accepted: \{'scale': '1.0'\}": encode(frontend=Halving(scale=2.0)),
        "dtype: got 'bfloat16'; accepted: 'float32'": encode(dtype="bfloat16"),
        "num_classes: got 9": encode(images=replace(images, num_classes=9)),
    }
    for message, call in others.items():
        refused(call, rf"^latent_cache: {message}.*give another folder; nothing was overwritten$")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", b"{", r"cannot read .*manifest\.json: "),
        ("manifest.json", b"{}", r"cannot read .*manifest\.json: data "),
        ("rows.safetensors", b"nothing", r"cannot read .*rows\.safetensors: .*; encode anew"),
    ],
)
def test_files_that_are_none_are_refused(
    tmp_path: Path, halving: Halving, file: str, content: bytes, message: str
) -> None:
    cached(tmp_path, halving)
    (tmp_path / file).write_bytes(content)
    refused(lambda: open_cache(tmp_path), message)
    refused(lambda: cached(tmp_path, halving), message)


def test_altered_labels_or_an_altered_manifest_are_noticed(tmp_path: Path, halving: Halving) -> None:
    cached(tmp_path, halving)
    altered(tmp_path / "rows.safetensors")
    refused(lambda: open_cache(tmp_path), r"rows\.safetensors was altered, or is of another cache")
    stored = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**stored, "weights": Halving(seed=1).weights}))
    refused(lambda: cached(tmp_path, Halving(seed=1)), r"shard-00000-.* is of another cache")
    (tmp_path / "manifest.json").write_text(json.dumps({**stored, "rows_per_shard": 2}))
    refused(lambda: open_cache(tmp_path), r"shard-00000-.* is of another cache")
    (tmp_path / "manifest.json").write_text(json.dumps({**stored, "rows_per_shard": 0}))
    refused(lambda: open_cache(tmp_path), r"a count in it is below 1")


def test_folders_that_are_no_cache_are_left_alone(tmp_path: Path, halving: Halving) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(lambda: cached(tmp_path, halving), r"^latent_cache: got .*an empty folder or a cache .*notes\.txt.*nothing")
    assert os.listdir(tmp_path) == ["notes.txt"]
    refused(lambda: open_cache(tmp_path), r"^latent_cache: .* is no cache of latents: No such file")
    refused(lambda: cached(tmp_path / "notes.txt", halving), r"^latent_cache: cannot write to .*notes\.txt: ")
    refused(
        lambda: cached(tmp_path / "notes.txt" / "x", halving), r"^latent_cache: cannot write to .*: Not a directory"
    )


def test_a_full_disk_is_one_line_and_leaves_what_was_finished(
    tmp_path: Path, halving: Halving, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, fsync = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 4:  # rows, manifest, a shard, and then
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(lambda: cached(tmp_path, halving), r"^latent_cache: cannot write to .*: No space left on device$")
    assert len(list(tmp_path.glob("shard-*"))) == 1
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(cached(tmp_path, halving)) == COUNT


def test_ranks_wait_for_the_one_that_encodes(
    tmp_path: Path, halving: Halving, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl
    import threading

    caplog.set_level(logging.INFO)
    waiting = threading.Event()

    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for another process" in record.getMessage():
                waiting.set()

    handler = Seen()
    logging.getLogger("dit_dp.frontends.cache").addHandler(handler)
    found: list[CachedLatents] = []
    try:
        with (tmp_path / ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            other = threading.Thread(target=lambda: found.append(cached(tmp_path, halving)))
            other.start()
            assert waiting.wait(30)
            assert not list(tmp_path.glob("shard-*"))
        other.join(30)
    finally:
        logging.getLogger("dit_dp.frontends.cache").removeHandler(handler)
    assert len(found[0]) == COUNT


def test_what_is_no_image_is_refused(tmp_path: Path, halving: Halving) -> None:
    latents = cached(tmp_path / "cache", halving)
    folder = tmp_path / "new"
    for images, message in (
        (latents, r"^images: got 'latents of .*accepted: images; they are encoded already"),
        (synthetic(size=8, channels=4, num_classes=3, count=2), r"^images: got '2 of 4 channels'.*takes pixels"),
        (synthetic(size=8, channels=3, num_classes=3, count=9), r"^images: got 'a value of size .*not latents"),
        (image_set(3, size=7), r"^image_size: got 7; accepted: a multiple of 2; a latent position covers 2 pixels"),
        (image_set(0), r"^images: got '0 of 3 channels'.*at least one"),
    ):
        refused(lambda images=images: encode_data(images, halving, folder), message)  # type: ignore[misc]
    for name, value in (("batch_size", 0), ("shard_bytes", 0), ("dtype", "int8")):
        given = {name: value}
        refused(lambda given=given: encode_data(image_set(2), halving, folder, **given), rf"^{name}: got")  # type: ignore[misc]


def test_latents_that_do_not_fit_their_dtype_are_refused(tmp_path: Path) -> None:
    refused(
        lambda: cached(tmp_path, Halving(scale=1e6), dtype="float16"),
        r"^latent_cache: the latents of image 0 are not finite; or it does not fit into torch\.float16: store float32$",
    )


def test_latents_of_a_folder_of_images(tmp_path: Path, halving: Halving) -> None:
    root = write_folder(tmp_path / "images", image_set(6))
    images = image_folder(root, size=8)
    latents = encode_data(images, halving, tmp_path / "cache")
    index = torch.tensor([5, 1])
    assert torch.allclose(latents.take(index)[0], halving.encode(images.take(index)[0]), rtol=0, atol=1e-6)
    assert latents.digests() == images.digests()
    (root / "class-0" / "000.png").unlink()
    refused(
        lambda: encode_data(image_folder(root, size=8), halving, tmp_path / "cache"),
        r"^latent_cache: data: .*also: num_images.*nothing was overwritten$",
    )


def test_only_the_rows_that_are_drawn_are_read(
    tmp_path: Path, halving: Halving, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = cached(tmp_path, halving)
    opened: list[str] = []
    from dit_dp.frontends import cache

    whole = cache.safe_open

    def safe_open(path: Path, framework: str) -> object:
        opened.append(path.name[:11])
        return whole(path, framework)

    monkeypatch.setattr(cache, "safe_open", safe_open)
    latents.subset([9, 10, 3]).take(torch.tensor([0, 1]))
    assert opened == ["shard-00003"]
