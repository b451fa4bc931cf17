"""Build what a configuration names: a model, its data and its objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn, map_tensors
from dit_dp.data import ImageSet, digits, synthetic
from dit_dp.errors import UsageError
from dit_dp.objectives import DDPMObjective
from memory_test.core.config import is_custom
from memory_test.core.custom import OwnModel, build_own, with_rows
from memory_test.core.units import GIB

_SYNTHETIC_IMAGES = 64


def build_model(resolved: dict[str, Any]) -> nn.Module:
    """Build the DiT of a resolved configuration on the CPU, in training mode."""
    if resolved["pretrained"]:
        from dit_dp.models import DiTHuggingFaceWrapper

        wrapper = DiTHuggingFaceWrapper(
            model_name=resolved["model"],
            img_size=resolved["image_size"],
            patch_size=resolved["patch_size"],
            in_channels=resolved["in_channels"],
            num_classes=resolved["num_classes"],
            pretrained=True,
            latent_downsample=resolved["latent_downsample"],
            class_dropout_prob=resolved["class_dropout_prob"],
            learn_sigma=resolved["learn_sigma"],
            activation_checkpointing=resolved["activation_checkpointing"],
        )
        return wrapper.train()
    from dit_dp.models.dit import DiT

    return DiT(
        input_size=resolved["latent_size"],
        patch_size=resolved["patch_size"],
        in_channels=resolved["in_channels"],
        hidden_size=resolved["hidden_size"],
        depth=resolved["depth"],
        num_heads=resolved["num_heads"],
        class_dropout_prob=resolved["class_dropout_prob"],
        num_classes=resolved["num_classes"],
        learn_sigma=resolved["learn_sigma"],
        activation_checkpointing=resolved["activation_checkpointing"],
    ).train()


class Data(Protocol):
    """Where batches come from.

    Attributes:
        objective: The loss of each example.
        device: Where batches arrive.
        device_generator: Randomness on that device.
    """

    @property
    def objective(self) -> LossFn: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def device_generator(self) -> torch.Generator: ...  # noqa: D102

    def batch(self, size: int) -> Batch:
        """Return a batch, on the device."""


@dataclass(frozen=True)
class ImageData:
    """Images on the CPU, and how a batch is made of them."""

    images: ImageSet
    objective: DDPMObjective
    device: str
    generator: torch.Generator
    device_generator: torch.Generator

    def batch(self, size: int) -> dict[str, Tensor]:
        """Draw a batch with all of its randomness, on the device."""
        x, labels = self.images.rows(size, self.generator)
        return self.objective.draw(x.to(self.device), labels.to(self.device), self.device_generator)


@dataclass(frozen=True)
class OwnData:
    """A batch of the user's own, brought to the device anew for each physical batch."""

    rows: Batch
    objective: LossFn
    device: str
    device_generator: torch.Generator

    def batch(self, size: int) -> Batch:
        """Return the batch of `size` rows."""
        return map_tensors(lambda tensor: tensor.to(self.device), with_rows(self.rows, size))


@dataclass(frozen=True)
class Workload:
    """A model, and what makes its data once it is attached.

    Attributes:
        model: On the CPU.
        make_data: Told where batches arrive.
    """

    model: nn.Module
    make_data: Callable[[str], Data]


def build_data(resolved: dict[str, Any]) -> ImageData:
    """Build data and objective of a resolved configuration of a DiT."""
    if resolved["data"] == "digits":
        images = digits(size=resolved["latent_size"])
        if images.num_classes > resolved["num_classes"]:
            raise UsageError.for_value("num_classes", resolved["num_classes"], f">= {images.num_classes} for digits")
    else:
        images = synthetic(
            size=resolved["latent_size"],
            channels=resolved["in_channels"],
            num_classes=resolved["num_classes"],
            count=min(_SYNTHETIC_IMAGES, 4 * resolved["batch_size"]),
            seed=resolved["seed"],
        )
    device = resolved["device"]
    return ImageData(
        images=images,
        objective=DDPMObjective(learn_sigma=resolved["learn_sigma"], class_dropout_prob=resolved["class_dropout_prob"]),
        device=device,
        generator=torch.Generator().manual_seed(resolved["seed"]),
        device_generator=torch.Generator(device=device).manual_seed(resolved["seed"]),
    )


def build(resolved: dict[str, Any]) -> Workload:
    """Build what a resolved configuration names.

    Raises:
        UsageError: It cannot be had.
    """
    if is_custom(resolved["model"], resolved["pretrained"]):
        own = build_own(resolved["model"])
        return Workload(own.model, lambda device: _own_data(own, resolved, device))
    return Workload(build_model(resolved), lambda device: build_data({**resolved, "device": device}))


def _own_data(own: OwnModel, resolved: dict[str, Any], device: str) -> OwnData:
    loss_fn, batch = own.case(resolved["batch_size"])
    rows = with_rows(batch, resolved["batch_size"])
    return OwnData(rows, loss_fn, device, torch.Generator(device=device).manual_seed(resolved["seed"]))


def engine_options(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings an engine is attached with: its memory budget in bytes, if it was given one."""
    budget = resolved["memory_budget_gib"]
    return {} if budget is None else {"memory_budget": int(budget * GIB)}


def loss_function(data: Data, dtype: str) -> LossFn:
    """Return the objective, under bf16 autocast if asked for."""
    if dtype == "float32":
        return data.objective

    def lowered(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(data.device, dtype=torch.bfloat16):
            return data.objective(model, batch)

    return lowered
