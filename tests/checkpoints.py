"""A tiny run in phases that checkpoints are taken of, without noise so that two runs can be the same to the bit."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_dp.clipping import attach
from dit_dp.models.dit import DiT, randomize_zero_init_
from dit_dp.objectives import Objective
from dit_dp.training import Phase, PhaseRunner, Schedule, train_step
from dit_dp.training.checkpoint import CheckpointState, PrivacyFacts, base_digest
from tests import workload_models

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2, weight_decay=0.1, momentum=0.9),
    "plain": partial(torch.optim.SGD, lr=1e-2),
}
ALL_HEAD_ALL = Schedule(
    phases=(Phase(groups=("all",), end=2), Phase(groups=("head",), start=3, end=4), Phase(groups=("all",), start=5))
)
DATA = "da" * 32


class Run:
    """A model, its runner, and steps on a batch that stays the same."""

    def __init__(
        self,
        name: str = "dit",
        schedule: Schedule | str = "full",
        *,
        optimizer: str = "adamw",
        ema_decay: float | None = 0.5,
        dtype: torch.dtype = torch.float32,
        step: int = 1,
    ) -> None:
        torch.manual_seed(0)
        if name == "dit":
            self.model = DiT(**workload_models.DIT)
            randomize_zero_init_(self.model.train(), torch.Generator().manual_seed(1), std=0.1)
            self.objective = Objective(workload_models.EPS)
            generator = torch.Generator().manual_seed(2)
            x0 = torch.randn(workload_models.UNITS, 4, 8, 8, generator=generator)
            self.batch = self.objective.draw(x0, torch.arange(workload_models.UNITS), generator)
        else:
            self.model = workload_models.build(name)
            self.objective, self.batch, _ = workload_models.draw(name)
        self.model.to(dtype)
        self.batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.batch.items()}
        self.runner = PhaseRunner(
            self.model,
            Schedule.preset(schedule) if isinstance(schedule, str) else schedule,
            attach=partial(attach, method="bookkeeping"),
            make_optimizer=OPTIMIZERS[optimizer],
            ema_decay=ema_decay,
            step=step,
        )

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.runner.apply(step)
            train_step(
                self.runner.engine,
                self.runner.optimizer,
                self.objective,
                [self.batch],
                noise_multiplier=0.0,
                expected_batch_size=workload_models.UNITS,
                ema=self.runner.ema,
                row_to_unit=self.objective.row_to_unit,
            )

    def state(self, step: int, **changes: Any) -> CheckpointState:
        return dataclasses.replace(state_of(self.runner, step), **changes)

    def everything(self) -> dict[str, Tensor]:
        """Copy all that must come back: weights, masters, optimizer state, averages."""
        runner = self.runner
        found = {f"model {name}": p for name, p in self.model.named_parameters()}
        found |= {f"master {name}": p for name, p in runner.engine.parameters.items()}
        found |= {f"average {name}": average for name, average in runner.averages.items()}
        names = {id(p): name for name, p in runner.engine.parameters.items()}
        for parameter, state in runner.optimizer.state.items():
            found |= {f"{kind} {names[id(parameter)]}": value for kind, value in state.items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def state_of(runner: PhaseRunner, step: int) -> CheckpointState:
    return CheckpointState(
        step=step,
        phase=runner.schedule.index_at(max(step, 1)),
        workload="dit",
        spec={"sizes": (1, 2), "model": "DiT-S/2"},
        base_sha256=base_digest(runner),
        data_sha256=DATA,
        settings={"learning_rate": 1e-2, "optimizer": "adamw"},
        privacy=PrivacyFacts(noise_multiplier=1.0, sample_rate=0.01, delta=1e-5, num_charged_steps=step),
        world_size=1,
    )


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare bit by bit, dtypes too."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
