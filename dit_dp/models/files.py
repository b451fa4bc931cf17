"""Weights in files: read without running anything that is in them, and put into a model by name.

A `.safetensors` file is a table of tensors and cannot hold anything else. Torch's own format can hold instructions that
run when it is read; files of it are read by torch's restricted reader alone, which knows tensors and containers.
"""

import argparse
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dit_dp.errors import CheckpointError, UsageError

log = logging.getLogger(__name__)

KEYS = ("ema", "model", "state_dict")
"""Where files that hold more than weights keep them, in the order in which they are taken."""

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def load_weights(path: Path | str, *, key: str | None = None) -> dict[str, Tensor]:
    """Read weights, such as a published DiT checkpoint, on the CPU, mapped from the file where that is possible.

    Args:
        path: A ``.safetensors`` file, or one of torch's (`TORCH_SUFFIXES`).
        key: Entry of a torch file under which the weights are; default: the file itself if it holds tensors, else the
            first of `KEYS` that it has, which is logged.

    Returns:
        Tensors by the names that they have in the file. diffusers' names are mapped by
        `dit_dp.models.weights.diffusers_to_reference`.

    Raises:
        UsageError: No file, another kind of file, or a `key` that it has not.
        CheckpointError: The file is damaged, or holds something else than tensors.
    """
    file = Path(path)
    accepted = f"a file that ends in {', '.join(('.safetensors', *TORCH_SUFFIXES))}"
    if not file.is_file():
        raise UsageError.for_value("weights", str(path), accepted, "there is no such file")
    if file.suffix == ".safetensors":
        if key is not None:
            raise UsageError.for_value("key", key, "None", "a safetensors file has no entries but tensors")
        return dict(TensorFile(file))
    if file.suffix not in TORCH_SUFFIXES:
        raise UsageError.for_value("weights", str(path), accepted)
    return _tensors(_entry(_read_restricted(file), key, file), file)


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy tensors into a model's parameters and persistent buffers by name, in place; all fit, or none is copied.

    Args:
        model: Not sharded. Values are converted to its dtypes.
        tensors: By name; of tied parameters one name is enough.
        strict: Every tensor of the model must be there and no other; if not, what is missing is left as it is, what
            is unknown left out, and both are logged.

    Raises:
        CheckpointError: Names or shapes do not fit; gives counts and the first names.
    """
    targets = dict(model.state_dict(keep_vars=True))
    targets = {name: target for name, target in targets.items() if isinstance(target, Tensor)}
    given = {id(targets[name]) for name in tensors.keys() & targets.keys()}
    missing = [name for name, target in targets.items() if id(target) not in given]
    unexpected = [name for name in tensors if name not in targets]
    unlike = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(target.shape)}"
        for name, target in targets.items()
        if name in tensors and not _alike(tensors[name], target)
    ]
    problems = [_counted(missing, "missing"), _counted(unexpected, "unexpected"), _counted(unlike, "of another shape")]
    if unlike or (strict and (missing or unexpected)):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"weights: they do not fit {type(model).__name__}: {found}{_hint(unexpected)}")
    if missing or unexpected:
        log.info("weights: %s", "; ".join(problem for problem in problems[:2] if problem))
    for name, target in targets.items():
        if hasattr(target, "device_mesh"):
            raise UsageError(f"weights: parameter {name} is sharded already; load weights before fully_shard")
    with torch.no_grad():
        for name in tensors.keys() & targets.keys():
            targets[name].copy_(tensors[name])


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a file of all weights holds: parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def listing(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each mapped from it when it is asked for.

    Raises:
        CheckpointError: The file cannot be read as one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            opened: Any = safe_open(path, framework="pt", device="cpu")  # without types
            self._file, self._names = opened, sorted(opened.keys())
        except (OSError, SafetensorError) as error:
            raise self._error(error) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._error(error) from error
        return tensor

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _error(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"weights: {self._path} is no whole safetensors file: {' '.join(str(error).split())}")


def _read_restricted(file: Path) -> Any:
    """Return what a torch file holds if that is tensors, containers and plain values.

    The reference's training checkpoints hold their command line too, as argparse's Namespace, a bag of plain values.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged file can make the reader fail in any way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"weights: {file} is damaged or holds more than tensors, and nothing else is read: {reason}"
        ) from error


def _entry(loaded: Any, key: str | None, file: Path) -> Any:
    """Return the entry that holds the weights."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"weights: {file} holds a {type(loaded).__name__}; accepted: tensors by name")
    names = [str(name) for name in loaded]
    if key is not None:
        if key not in loaded:
            raise UsageError.for_value("key", key, listing(names, 8), f"the entries of {file}")
        return loaded[key]
    if not loaded or any(isinstance(value, Tensor) for value in loaded.values()):
        return loaded
    for candidate in KEYS:
        if isinstance(loaded.get(candidate), Mapping):
            log.info("weights: %s holds %s; took %r", file, listing(names, 8), candidate)
            return loaded[candidate]
    raise UsageError.for_value("key", None, listing(names, 8), f"{file} has no entry {' or '.join(KEYS)}: say which")


def _tensors(entry: Any, file: Path) -> dict[str, Tensor]:
    """Return the entry's tensors, or refuse it."""
    if not isinstance(entry, Mapping) or not entry:
        what = "an empty mapping" if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
        raise CheckpointError(f"weights: {file} holds {what} where tensors by name are expected")
    for name, value in entry.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"weights: {file}: entry {name!r} is no dense tensor but a {type(value).__name__}")
    return {name: value.detach() for name, value in entry.items()}


def _alike(tensor: Tensor, target: Tensor) -> bool:
    """Return whether a tensor can be copied into a target without being spread out or losing its meaning."""
    return tensor.shape == target.shape and tensor.is_floating_point() == target.is_floating_point()


def _counted(names: list[str], what: str) -> str:
    """Return ``2 missing (a, b)``, or nothing."""
    return f"{len(names)} {what} ({listing(names)})" if names else ""


def _hint(unexpected: list[str]) -> str:
    """Return what to do about names that are another model's."""
    if any(name.startswith("transformer_blocks.") for name in unexpected):
        return "; these are diffusers' names: map them by dit_dp.models.weights.diffusers_to_reference"
    if any(".lora_" in name for name in unexpected):
        return "; they hold low-rank adapters: give the model its adapters first, dit_dp.training.groups.add_lora"
    return ""
