"""Build what a configuration names: a model, its data and its objective."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_dp import workloads
from dit_dp.clipping.batch import Batch, LossFn, map_tensors, num_rows
from dit_dp.clipping.hardware import hardware
from dit_dp.data import Examples, Images, ImageSets, digits, synthetic
from dit_dp.data.sets import Partition
from dit_dp.objectives import Objective, ObjectiveConfig
from dit_dp.training.groups import add_lora, members, parts_of
from dit_dp.training.schedule import Schedule
from dit_dp.workloads import WorkloadSpec
from memory_test.core.custom import OwnModel, build_own, with_rows
from memory_test.core.model_args import is_custom
from memory_test.core.units import GIB

_SYNTHETIC_UNITS = 64


def spec_of(resolved: dict[str, Any]) -> WorkloadSpec:
    """Return the specification that a resolved configuration holds."""
    objective = {**resolved["objective"]}
    if objective["context_shape"] is not None:
        objective["context_shape"] = tuple(objective["context_shape"])
    made = {
        "name": resolved["workload"],
        "arguments": resolved["model_options"],
        "objective": ObjectiveConfig(**objective),
    }
    return WorkloadSpec(**{f.name: resolved[f.name] for f in fields(WorkloadSpec) if f.name not in made}, **made)


def build_model(resolved: dict[str, Any]) -> nn.Module:
    """Build the model of a resolved configuration on the CPU, in training mode; what rests in step 1 is frozen.

    Raises:
        UsageError: It cannot be built, or has no such parameters to train.
    """
    spec = spec_of(resolved)
    return train_first_phase(workloads.build_model(spec), spec.schedule)


def train_first_phase(model: nn.Module, schedule: Schedule) -> nn.Module:
    """Let those parameters alone take gradients that train in step 1, in place; returns the model.

    Raises:
        UsageError: A group that the model has not, or adapters without peft.
    """
    if schedule.lora_rank is not None:
        add_lora(model, schedule.lora_rank)
    chosen, *_ = [set(members(model, phase.groups)) for phase in schedule.phases]  # later ones: are there such groups
    for name in {name for names in parts_of(model).values() for name in names}:
        model.get_parameter(name).requires_grad_(name in chosen)
    return model


class Data(Protocol):
    """Where batches come from.

    Attributes:
        objective: The loss of each unit.
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
        """Return a batch of so many units, on the device."""

    def row_to_unit(self, batch: Batch) -> Tensor | None:
        """Return the unit of each row of a batch, (R,), on the CPU; `None` where every row is one."""


@dataclass(frozen=True)
class ImageData:
    """Images, or sets of them, on the CPU, and how a batch is made of them."""

    examples: Examples
    objective: Objective
    device: str
    generator: torch.Generator
    device_generator: torch.Generator

    def batch(self, size: int) -> dict[str, Tensor]:
        """Draw a batch with all of its randomness, on the device."""
        x, labels = self.examples.take(torch.randint(0, len(self.examples), (size,), generator=self.generator))
        labels = None if labels is None else labels.to(self.device)
        return self.objective.draw(x.to(self.device), labels, self.device_generator)

    def row_to_unit(self, batch: Batch) -> Tensor | None:
        """Return what `Objective.row_to_unit` does, with data also where the batch has none."""
        rows = self.objective.config.rows_per_unit
        if rows == 1:
            return None
        with hardware().with_data():
            return torch.arange(num_rows(batch) // rows).repeat_interleave(rows)


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

    def row_to_unit(self, batch: Batch) -> None:
        """Return `None`: every row is an example."""


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
    """Build data and objective of a resolved configuration."""
    spec = spec_of(resolved)
    device, seed = resolved["device"], resolved["seed"]
    return ImageData(
        examples=_examples(spec, resolved["data"], min(_SYNTHETIC_UNITS, 4 * resolved["batch_size"]), seed),
        objective=workloads.build_objective(spec),
        device=device,
        generator=torch.Generator().manual_seed(seed),
        device_generator=torch.Generator(device=device).manual_seed(seed),
    )


def _examples(spec: WorkloadSpec, kind: str, count: int, seed: int) -> Examples:
    """Return digits, or `count` synthetic units, of the shape that the model takes."""
    *sets, channels, size, _ = workloads.input_shape(spec)
    if kind == "digits":
        images = digits(size=size)
        with hardware().with_data():  # which digits are alike is known also where the rest has no data
            labels = digits(size=size).labels.tolist() if sets else []
    else:
        number, classes = count * (sets[0] if sets else 1), spec.num_classes or 1
        images = synthetic(size=size, channels=channels, num_classes=classes, count=number, seed=seed)
        labels = [0] * number
    return _in_sets(images, sets[0], labels, seed) if sets else images


def _in_sets(images: Images, size: int, labels: list[int], seed: int) -> ImageSets:
    """Return sets of images of one class, as they come: no unit of anybody's, so that no file says who is together."""
    classes = [[n for n, label in enumerate(labels) if label == known] for known in sorted(set(labels))]
    sets = [members[start : start + size] for members in classes for start in range(0, len(members) - size + 1, size)]
    left = len(labels) - size * len(sets)
    return ImageSets(images, Partition(data="", set_size=size, seed=seed, num_left_out=left, sets=sets))


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
