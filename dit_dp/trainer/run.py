"""A run from its configuration to its last checkpoint."""

import logging
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.files import replacing
from dit_dp.trainer.budget import Budget, plan_budget
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.data import RunData, open_data
from dit_dp.trainer.dry import check_run
from dit_dp.trainer.folder import NOT_PRIVATE, RunLog, naming, new_run, newest_run, run_label, write_json
from dit_dp.trainer.grids import draw_grid
from dit_dp.trainer.interrupts import waiting
from dit_dp.trainer.meter import StepClock, peak_memory_bytes
from dit_dp.trainer.progress import Progress
from dit_dp.trainer.saving import named_run, newest, refuse_spent, save, starting_model, write_or_save
from dit_dp.trainer.tracker import check_tracker, make_tracker
from dit_dp.trainer.trainer import GIB, Trainer
from dit_dp.trainer.validation import example_inputs, held_out_contexts, validation_loss
from dit_dp.trainer.world import World, join_world, leave_world
from dit_dp.workloads import WorkloadSpec

log = logging.getLogger(__name__)

COMPARED = 3
"""Steps before those whose median time is kept: the first one builds the optimizer's state and runs trials."""


def run(config: TrainConfig) -> int:
    """Train; the same on one device, and on many that torchrun started.

    Returns:
        The exit code: 0.

    Raises:
        UsageError: Whatever the user can get wrong.
    """
    world = join_world(config.device)
    try:
        with world.one_voice():
            return Run(config, world).go()
    finally:
        leave_world(world)


class Run:
    """What is done before, around and after the trainer's steps.

    Args:
        config: What was asked for.
        world: This process among the others.

    Attributes:
        folder: Of the run, once it has started.
    """

    folder: Path

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.spec = config, world, config.spec
        self._data, self._budget = self._open()

    def go(self) -> int:
        """Train to the end; return the exit code."""
        if self.config.dry_run:
            self.world.first(partial(check_run, self.config, self.spec, alone=self.world.group is None))
            if self.world.leads:
                sys.stdout.write(describe(self.config, self.spec, self._budget))
            return 0
        for _ in self.steps():
            pass
        return 0

    def steps(self) -> Iterator[int]:
        """Take all steps, with what a run does for each; yield the number of each when that is done."""
        trainer, config = self.start(), self.config
        self._log, self._tracker = RunLog(None), make_tracker("none", self.folder, self.folder.name, {})
        self._clock, times, began = StepClock(), [], time.perf_counter()
        try:
            self.world.first(partial(self._head, trainer))
            if config.tracker != "none" and self.world.group is None and trainer.step == 0:
                self._tracker.graph(trainer.runner.model, example_inputs(trainer))
            with (
                Progress(trainer.budget.num_steps, trainer.step, shown=self.world.leads) as progress,
                waiting(alone=self.world.group is None) as stopped,
            ):
                last = time.perf_counter()
                for step in trainer.steps():
                    times.append(time.perf_counter() - last)
                    progress.advance(step, self._after(trainer, step))
                    yield step
                    number = self.world.largest(stopped())
                    if number and trainer.step < trainer.budget.num_steps:
                        save(trainer)
                        raise KeyboardInterrupt(number) if self.world.leads else SystemExit(128 + number)
                    last = time.perf_counter()
            if times:  # none: the budget was spent on steps that were lost, and the checkpoint is as it was
                save(trainer)
            self.world.first(partial(self._summary, trainer, times[COMPARED:], time.perf_counter() - began))
        finally:
            trainer.close()
            self._log.close()

    def start(self) -> Trainer:
        """Return the trainer, at its first step or at that of the checkpoint it goes on from; makes the folder."""
        if self.world.leads:
            check_tracker(self.config.tracker)
        model = starting_model(self.config, self.spec)
        self.folder, going_on = self._folder()
        try:
            checkpoint = newest(self.folder) if going_on else None
            return Trainer(self.config, self.spec, self._data, self._budget, self.world, self.folder, model, checkpoint)
        except BaseException:
            if not going_on and self.world.leads and not (self.folder / "ledger.jsonl").exists():
                shutil.rmtree(self.folder)  # nothing was begun
            raise

    def _open(self) -> tuple[RunData, Budget]:
        """Return the data and what the run will do; the first process makes what is made once."""
        config, world = self.config, self.world
        world.first(partial(refuse_spent, config))
        make = partial(open_data, config, self.spec, config.output_dir / "cache", world.device)
        data = world.first(make) or make()
        self._require_same(data)
        return data, world.shared(world.first(lambda: plan_budget(config, self.spec, len(data.train))))

    def _require_same(self, data: RunData) -> None:
        """Refuse data that are not the same in every process: unit n would be another one on each, drawn twice."""
        differs = self.world.shared(data.digest) != data.digest
        if self.world.total(torch.tensor(float(differs), device=self.world.device)) > 0:
            fix = "a unit under two numbers would be drawn twice"
            raise UsageError.for_value("data", self.config.data, "the same images, in every process", fix)

    def _folder(self) -> tuple[Path, bool]:
        """Return the run's folder, and whether it is one to go on with."""
        config = self.config
        if config.resume not in (None, "auto"):
            return named_run(config.resume or ""), True
        folder, going_on = self.world.shared(self.world.first(self._own_folder))
        return folder, going_on

    def _own_folder(self) -> tuple[Path, bool]:
        """Return the newest run's folder, if it is to go on, or make one."""
        config, label = self.config, run_label(self.config, self.spec)
        before = newest_run(config.output_dir, label) if config.resume == "auto" else None
        return before or new_run(config.output_dir, label), before is not None

    def _head(self, trainer: Trainer) -> None:
        """Open log and tracker, and say what this run is."""
        self._log = RunLog(self.folder)
        with naming(self.folder):
            self._tracker = make_tracker(self.config.tracker, self.folder, self.folder.name, self.config.as_json())
        for line in describe(self.config, self.spec, trainer.budget).splitlines():
            log.info("%s", line)
        log.info("%s", NOT_PRIVATE)
        log.info("run: %s", self.folder)
        write_json(self.folder / "config.json", self.config.as_json())
        self._log.check()

    def _after(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Keep, log and show what is due after a step, in this order; return the numbers that were logged."""
        self._clock.count(trainer.feed.num_drawn)
        every = self.config.checkpoint_every or min(1000, max(10, trainer.budget.num_steps // 10))
        if step % every == 0:
            save(trainer)
        values = self._line(trainer, step) if trainer.is_logged(step) else {}
        if self.config.num_samples and self._is_sampled(step, trainer.budget.num_steps):
            self._grid(trainer, step)
        return values

    def _line(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Log a step's numbers and return them."""
        config = self.config
        steps_per_s, examples_per_s = self._clock.take()
        values: dict[str, Any] = {
            "loss": trainer.losses.take(self.world),
            "learning_rate": trainer.runner.optimizer.param_groups[0]["lr"],
            "steps_per_s": steps_per_s,
            "examples_per_s": examples_per_s,
            "peak_memory_gib": peak_memory_bytes(self.world.device) / GIB,
            "num_dropped": float(trainer.num_dropped),
        }
        spent = trainer.spent(exactly=False)
        if spent is not None and spent.epsilon is not None:
            values |= {"epsilon": spent.epsilon, "delta": trainer.budget.delta}
            values |= {"epsilon_charges": spent.num_charges, "num_charges": trainer.num_charges}
        every = config.log_every if config.validate_every is None else config.validate_every
        if trainer.data.held_out is not None and every and (step % every == 0 or step == trainer.budget.num_steps):
            values["validation_loss"] = validation_loss(trainer)
        values |= trainer.runner.log_values(held_out_contexts(trainer))
        write_or_save(trainer, partial(self._write_line, trainer, step, values))
        return values

    def _write_line(self, trainer: Trainer, step: int, values: dict[str, Any]) -> None:
        """Write a step's numbers down."""
        self._log.line(step, values)
        with naming(self.folder):
            self._tracker.scalars(step, {name: value for name, value in values.items() if value == value})
            if self.config.tracker != "none" and self.config.sharding == "ddp":
                for name, parameter in trainer.runner.engine.parameters.items():
                    self._tracker.histogram(step, f"weights/{name}", parameter.detach())

    def _is_sampled(self, step: int, last: int) -> bool:
        every = self.config.sample_every
        return step == last or (every is not None and step % every == 0)

    def _grid(self, trainer: Trainer, step: int) -> None:
        """Draw a grid of samples and keep it; every process draws, if parameters are shared."""
        image = draw_grid(trainer) if self.world.leads or self.config.sharding != "ddp" else None
        write_or_save(trainer, partial(self._write_grid, step, image))

    def _write_grid(self, step: int, image: Image | None) -> None:
        """Write a grid down, if there is one."""
        if image is None:
            return
        path = self.folder / "samples" / f"step-{step:08d}.png"
        with naming(path):
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as handle:
                image.save(handle, format="PNG")
            self._tracker.image(step, "samples", image)

    def _summary(self, trainer: Trainer, times: list[float], seconds: float) -> None:
        """Say what became of the run, and write it down."""
        claim, spent = trainer.claim(), trainer.spent(exactly=True)
        log.info("done: %d of %d steps; %s", trainer.step, trainer.budget.num_steps, claim)
        write_json(
            self.folder / "summary.json",
            {
                "steps": trainer.step,
                "num_steps": trainer.budget.num_steps,
                "num_charges": trainer.num_charges,
                "epsilon": None if spent is None else spent.epsilon,
                "delta": trainer.budget.delta,
                "noise_multiplier": trainer.budget.noise_multiplier,
                "sample_rate": trainer.budget.sample_rate,
                "unit": trainer.budget.unit,
                "num_units": trainer.budget.num_units,
                "claim": claim,
                "weights_are_public": self.config.weights_are_public,
                "seconds": seconds,
                "step_time_s": statistics.median(times) if times else None,
                "peak_memory_bytes": peak_memory_bytes(self.world.device),
                "peak_memory_is": "CUDA allocator"
                if self.world.device.type == "cuda"
                else "resident set of the process",
                "num_parameters": sum(p.numel() for p in trainer.runner.model.parameters()),
                "num_trainable_parameters": sum(p.numel() for p in trainer.runner.engine.parameters.values()),
                "method": self.config.method,
                "choices": trainer.runner.engine.choices(),
                "torch_version": torch.__version__,
                "num_threads": torch.get_num_threads(),
                "world_size": self.world.size,
            },
        )
        self._log.check()
        with naming(self.folder):
            self._tracker.close()
        sys.stdout.write(f"run: {self.folder}\n{claim}\n")


def describe(config: TrainConfig, spec: WorkloadSpec, budget: Budget) -> str:
    """Return what a run will do, a line each."""
    shape = f"{spec.in_channels} x {spec.latent_size} x {spec.latent_size}"
    tokens = "" if spec.num_tokens is None else f", {spec.num_tokens} tokens"
    lines = [
        f"workload          {config.workload}: {spec.model}, input {shape}{tokens}, trains {spec.train}",
        f"data              {config.data}: {budget.num_units} {budget.unit}s",
        f"method            {config.method}: {METHODS[config.method].summary}",
        f"batch             {budget.batch_size} {budget.unit}s expected, sampling {config.sampling} at rate "
        f"{budget.sample_rate:.4g}",
        f"steps             {budget.num_steps} ({budget.num_steps * budget.sample_rate:.4g} epochs)",
    ]
    if METHODS[config.method].private:
        lines.append(f"noise multiplier  {_up(budget.noise_multiplier)} at C = {config.max_grad_norm:g}")
    if budget.most_charges is not None and budget.most_charges < budget.num_steps:
        lines.append(f"budget            ends after {budget.most_charges} steps")
    lines.append(f"privacy           {budget.claim}")
    return "\n".join(lines) + "\n"


def _up(sigma: float) -> str:
    """Return a noise multiplier with four digits, rounded up, so that what is printed keeps the budget."""
    if sigma == 0:
        return "0"
    scale = 10 ** (3 - math.floor(math.log10(sigma)))
    return f"{math.ceil(sigma * scale - 1e-9) / scale:.{max(0, round(math.log10(scale)))}f}"
