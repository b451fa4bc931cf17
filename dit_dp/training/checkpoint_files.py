"""Checkpoints on disk: a folder each, whole or not there.

``FOLDER/step-00001234/`` holds `model.safetensors`, `optimizer.safetensors`, `ema.safetensors` if there are averages,
and `state.json`, which names the others with their hashes. It is written under a hidden name; every file and then the
folder are synced, and only then it gets its name, so that a process or machine that stops at any moment leaves all
checkpoints before it as they were. One process writes to a folder at a time.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dit_dp import validate
from dit_dp.errors import CheckpointError
from dit_dp.models.files import TensorFile, listing
from dit_dp.training.checkpoint_state import (
    EMA,
    MAX_BYTES,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointState,
    FileFacts,
    Manifest,
)

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,16})")
_HIDDEN = re.compile(r"\.step-\d{8,16}\.(tmp|old)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files were found to be what was written; tensors are mapped when they are asked for.

    Attributes:
        path: Its folder.
        state: What it says of its run.
        model: Weights by name; of what trains, the float32 masters of half-precision parameters.
        averages: Float32, by name; `None`: the run had none.
        optimizer: State by ``KIND/NAME``: ``exp_avg/blocks.0.attn.qkv.weight``.
    """

    path: Path
    state: CheckpointState
    model: Mapping[str, Tensor]
    averages: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Tensor]


class Draft:
    """A checkpoint that is being written; used as a context, out of which it is gone unless `commit` was called.

    Args:
        folder: Of the checkpoints.
        state: What to write of the run.
    """

    def __init__(self, folder: Path, state: CheckpointState) -> None:
        self.path = folder / f"step-{state.step:08d}"
        self._folder, self._state, self._files = folder, state, dict[str, FileFacts]()
        self._hidden = folder / f".{self.path.name}.tmp"

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one of `TENSOR_FILES`, durably.

        Args:
            name: Of the file.
            tensors: On the CPU, dense and contiguous, none sharing memory with another.

        Raises:
            CheckpointError: It cannot be written.
        """
        file = self._hidden / name
        with _writing(self.path):
            if not self._files:
                self._begin()
            save_file(dict(tensors), file)
            _sync(file)
            self._files[name] = FileFacts(num_bytes=file.stat().st_size, sha256=_hash(file))

    def commit(self) -> Path:
        """Write the state, make all of it durable and give it its name.

        Raises:
            CheckpointError: That failed, or a whole checkpoint has the name.
        """
        with _writing(self.path):
            file = self._hidden / STATE
            file.write_text(Manifest(state=self._state, files=self._files).dump(), encoding="utf-8")
            _sync(file)
            _sync(self._hidden)
            self._clear_name()
            os.replace(self._hidden, self.path)
            _sync(self._folder)
        return self.path

    def _begin(self) -> None:
        """Make the hidden folder, empty whatever an earlier process left there."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            _sync(self._folder.parent)
        _remove(self._hidden)
        self._hidden.mkdir()

    def _clear_name(self) -> None:
        """Put a damaged checkpoint of this name out of the way; never a whole one."""
        if not self.path.exists():
            return
        try:
            inspect(self.path)
        except CheckpointError:
            aside = self._folder / f".{self.path.name}.old"
            _remove(aside)
            os.replace(self.path, aside)
        else:
            raise CheckpointError(f"checkpoint: {self.path} is there already, of another run; take another folder")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._hidden, ignore_errors=True)


def inspect(path: Path) -> Manifest:
    """Read the state of a checkpoint and look whether its files are there in full; their content is not read.

    Raises:
        CheckpointError: It is not whole, or not a checkpoint.
    """
    file = path / STATE
    with _reading(path):
        if path.is_symlink() or not path.is_dir():
            raise CheckpointError(f"checkpoint: {path} is not the folder of a checkpoint")
        if not _is_plain(file):
            raise CheckpointError(f"checkpoint: {path} has no {STATE}: it is not whole, or not a checkpoint")
        if file.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"checkpoint: {file} has {file.stat().st_size} bytes; accepted: up to {MAX_BYTES}")
        manifest = Manifest.parse(file.read_bytes(), str(file))
        for name, facts in manifest.files.items():
            if not _is_plain(path / name):
                raise CheckpointError(f"checkpoint: {path} is not whole: {name} is missing or no plain file")
            size = (path / name).stat().st_size
            if size != facts.num_bytes:
                raise CheckpointError(
                    f"checkpoint: {path / name} has {size} bytes where {facts.num_bytes} were written"
                )
        extra = sorted({item.name for item in path.iterdir()} - {STATE, *manifest.files})
    if extra:
        raise CheckpointError(f"checkpoint: {path} holds more than its files: {listing(extra)!a}; move that away")
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest.state.step:
        raise CheckpointError(f"checkpoint: {path} is of step {manifest.state.step}; give it its name back")
    return manifest


def load(path: Path | str) -> Checkpoint:
    """Open a checkpoint, once the hash of every file is what was written.

    Args:
        path: Its folder, ``checkpoints/step-00001234``; for the newest, see `latest`.

    Raises:
        CheckpointError: It is damaged, not whole, of a newer version, or not a checkpoint.
    """
    folder = Path(path)
    manifest = inspect(folder)
    for name, facts in manifest.files.items():
        with _reading(folder):
            found = _hash(folder / name)
        if found != facts.sha256:
            raise CheckpointError(
                f"checkpoint: {folder / name} was changed after it was written; take another checkpoint"
            )
    opened = {name: TensorFile(folder / name) for name in manifest.files}
    return Checkpoint(
        path=folder,
        state=manifest.state,
        model=opened[MODEL],
        averages=opened.get(EMA),
        optimizer=opened[OPTIMIZER],
    )


def latest(folder: Path | str) -> Path | None:
    """Return the newest checkpoint of a folder that is whole, or `None`; a line is logged for each that is not."""
    return next(iter(_whole(Path(folder))), None)


def check_folder(folder: Path | str, step: int = 0) -> None:
    """Make sure, before any work is done, that a run which goes on after a step can keep its checkpoints in a folder.

    Raises:
        CheckpointError: It cannot be written to, or holds checkpoints of later steps, which would pass for this run's.
    """
    path = Path(folder)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    newest = latest(path)
    if newest is not None and _step(newest) > step:
        fix = "resume from it, move it away or take another folder"
        raise CheckpointError(f"checkpoint: {newest} is of a later step than {step}, where this run begins; {fix}")


def prune(folder: Path, keep: int) -> None:
    """Delete whole checkpoints but the newest, and what was never finished; damaged ones stay, for whoever wonders."""
    leftovers = [item for item in folder.iterdir() if _HIDDEN.fullmatch(item.name)]
    for path in list(_whole(folder, logging.DEBUG))[keep:]:
        hidden = folder / f".{path.name}.old"  # or a stop half way would leave what looks like a damaged one
        try:
            _remove(hidden)
            os.replace(path, hidden)
        except OSError as error:
            log.warning("checkpoint: cannot delete %s: %s", path, error.strerror or error)
        else:
            leftovers.append(hidden)
    for hidden in leftovers:
        shutil.rmtree(hidden, ignore_errors=True)


def check_keep(keep: int) -> None:
    """Raise `UsageError` unless at least the newest checkpoint is kept."""
    validate.integer("keep", keep, fix="the newest checkpoint is always kept")


def _whole(folder: Path, level: int = logging.WARNING) -> Iterator[Path]:
    """Yield whole checkpoints, the newest first; log the others."""
    with _reading(folder):
        found = [item for item in folder.iterdir() if _NAME.fullmatch(item.name)] if folder.is_dir() else []
    for path in sorted(found, key=_step, reverse=True):
        try:
            inspect(path)
        except CheckpointError as error:
            log.log(level, "%s; passed over", error)
        else:
            yield path


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a folder if it is there."""
    if path.exists():
        shutil.rmtree(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Report what the system refuses in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = f"checkpoint: cannot write {path}: {' '.join(reason.split())}; checkpoints before it are whole"
        raise CheckpointError(text) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report what the system refuses in one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot read {path}: {error.strerror or error}") from error
