"""Where a run's numbers and pictures go besides its log: TensorBoard, Weights & Biases, or nowhere."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dit_dp.errors import UsageError


class Tracker(Protocol):
    """What a run tells."""

    def scalars(self, step: int, values: Mapping[str, float | str]) -> None:
        """Take numbers, and words, by name."""

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Take the distribution of a tensor's values."""

    def image(self, step: int, name: str, image: Image) -> None:
        """Take a picture."""

    def graph(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take the model's graph, once."""

    def close(self) -> None:
        """Write what is not yet written."""


class _Nowhere:
    def scalars(self, step: int, values: Mapping[str, float | str]) -> None: ...
    def histogram(self, step: int, name: str, values: Tensor) -> None: ...
    def image(self, step: int, name: str, image: Image) -> None: ...
    def graph(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float | str]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        self._writer.add_histogram(name, values.float().cpu(), step)

    def image(self, step: int, name: str, image: Image) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def graph(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            self._writer.add_graph(model, inputs)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run = wandb.init(dir=str(folder), name=name, config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float | str]) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        self._run.log({name: self._wandb.Histogram(values.float().cpu().numpy())}, step=step)

    def image(self, step: int, name: str, image: Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def graph(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._run.watch(model, log=None, log_graph=True)

    def close(self) -> None:
        self._run.finish()


def make_tracker(kind: str, folder: Path, name: str, config: Mapping[str, Any]) -> Tracker:
    """Return a tracker.

    Args:
        kind: ``tensorboard``, ``wandb`` or ``none``.
        folder: Of the run.
        name: Of the run.
        config: What the run was asked for.

    Its package is installed: see `check_tracker`.
    """
    if kind == "tensorboard":
        return _TensorBoard(folder / "tensorboard")
    return _Wandb(folder, name, config) if kind == "wandb" else _Nowhere()


def check_tracker(kind: str) -> None:
    """Raise `UsageError` unless a tracker's package is installed: before anything is begun."""
    try:
        if kind == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
        elif kind == "wandb":
            importlib.import_module("wandb")
    except ImportError as error:
        raise _missing(kind, error) from error


def _missing(package: str, error: ImportError) -> UsageError:
    cause = " ".join(str(error).split())
    return UsageError(f"tracker: {package} cannot be imported ({cause}); pip install 'dit-dp[{package}]', or none")
