"""A run from budget to checkpoint: draw, charge, step, log; the same on one device and on many.

**Guarantees**: a step is charged on the disk before its sum is formed, so what was released is never more than what was
charged (of several processes the first keeps the ledger, and the others wait for the charge); the step that would
exceed the budget is not taken; noise and samples come from fresh entropy of the operating system, after a resume too.
**Edge cases**: a step without units releases noise and is charged like any other.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_dp.clipping import attach
from dit_dp.privacy import KEY_SIZE, Facts, Ledger, Mechanism, PoissonSampler, ShuffledSampler
from dit_dp.trainer.budget import Budget, claim
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.data import RunData
from dit_dp.trainer.feed import Feed
from dit_dp.trainer.meter import LossMeter
from dit_dp.trainer.price import Price, Spent
from dit_dp.trainer.rates import learning_rate_at
from dit_dp.trainer.reach import warn_of_noise_alone
from dit_dp.trainer.saving import restore, write_or_save
from dit_dp.trainer.world import World
from dit_dp.training import PhaseRunner, make_optimizer, train_step
from dit_dp.training.checkpoint import Checkpoint, base_digest
from dit_dp.workloads import WorkloadSpec, build_objective

log = logging.getLogger(__name__)

GIB = 2**30


class Trainer:
    """Everything a run holds, and its loop.

    Args:
        config: What was asked for.
        spec: Of the workload.
        data: To train on.
        budget: What the run will do.
        world: This process among the others.
        folder: Of the run.
        model: On the CPU, with its weights.
        checkpoint: To go on from.

    Attributes:
        runner: Model, engine, optimizer and averages.
        step: The last step that was taken.
        base_sha256: Of the weights that no phase trains.
        num_taken: Steps taken by this process.
        ledger: What was charged; `None` without a private method, and in processes that do not lead.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: WorkloadSpec,
        data: RunData,
        budget: Budget,
        world: World,
        folder: Path,
        model: nn.Module,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.spec, self.data, self.budget, self.world = config, spec, data, budget, world
        self.folder, self.step = folder, 0 if checkpoint is None else checkpoint.state.step
        self.objective = build_objective(spec)
        self.losses = LossMeter(self.objective, config.dtype, world.device)
        model = model.to(world.device)
        if checkpoint is None:
            warn_of_noise_alone(model, self.objective, spec, says=world.leads)
        self.runner = self._runner(model)
        self.base_sha256 = base_digest(self.runner)
        self.ledger = self._ledger()
        if checkpoint is not None:
            try:
                restore(self, checkpoint)
            except BaseException:
                self._let_go()
                raise
        self.feed = self._feed()
        self._noise = self._noise_generator()
        self._charged_before = world.shared(0 if self.ledger is None else self.ledger.num_charges)
        self.num_taken = self.num_dropped = 0
        self._price = Price(config.delta)

    # --- what a run is made of -------------------------------------------------------------------------------

    def _runner(self, model: nn.Module) -> PhaseRunner:
        config = self.config
        if config.compile:
            model.compile()
        if config.sharding == "fsdp2" and self.world.group is not None:
            from torch.distributed.device_mesh import init_device_mesh

            from dit_dp.training.shards import shard

            shard(model, init_device_mesh(self.world.device.type, (self.world.size,)))
        budget = config.memory_budget_gib
        options: dict[str, Any] = {} if budget is None else {"memory_budget": int(budget * GIB)}
        if self.world.group is not None and config.sharding == "ddp":
            options["process_group"] = self.world.group
        decay = config.chosen("ema_decay")
        optimizer = partial(
            make_optimizer,
            config.chosen("optimizer"),
            learning_rate=config.chosen("learning_rate"),
            implementation="foreach" if self.world.device.type == "cuda" else "for-loop",
            weight_decay=config.weight_decay,
            betas=config.chosen("betas"),
            momentum=config.momentum,
        )
        return PhaseRunner(
            model,
            self.spec.schedule,
            attach=partial(attach, method=config.method, max_grad_norm=config.max_grad_norm, **options),
            make_optimizer=optimizer,
            ema_decay=decay or None,
            step=max(1, self.step),
        )

    def _feed(self) -> Feed:
        config, count, seed = self.config, self.budget.num_units, self.config.insecure_seed
        entropy = self.world.entropy(KEY_SIZE) if seed is None else sha256(f"sampling {seed}".encode()).digest()
        if config.sampling == "poisson":
            sampler: Any = PoissonSampler(count, self.budget.sample_rate, entropy=entropy)
        else:
            sampler = ShuffledSampler(count, config.batch_size, entropy=entropy)
        return Feed(
            self.data.train,
            self.objective,
            sampler,
            self.world,
            physical=config.physical_batch_size,
            in_step=self.runner.engine.ranks.in_step,
            insecure_seed=seed,
        )

    def _ledger(self) -> Ledger | None:
        if not self.runner.engine.private:
            return None
        facts = Facts(
            dataset=self.data.digest,
            num_units=self.budget.num_units,
            unit=self.budget.unit,
            sampling=self.config.sampling,
            noise_multiplier=self._accounted_noise,
            sample_rate=self.budget.sample_rate,
        )
        return self.world.first(lambda: Ledger.open(self.folder / "ledger.jsonl", facts))

    @property
    def _accounted_noise(self) -> float:
        """Return the noise multiplier that is charged: none from a seed, which a run that goes on cannot mend."""
        return 0.0 if self.config.insecure_seed is not None else self.budget.noise_multiplier

    def _noise_generator(self) -> torch.Generator | None:
        """Return a source of noise for tests; `None`: the engine's own."""
        seed = self.config.insecure_seed
        return None if seed is None else torch.Generator(self.world.device).manual_seed(seed)

    # --- the loop --------------------------------------------------------------------------------------------

    @property
    def num_charges(self) -> int:
        """Steps charged so far, lost ones included."""
        return int(self._charged_before) + self.num_taken

    def steps(self) -> Iterator[int]:
        """Take steps until the last one or the end of the budget; yield the number of each when it is taken."""
        while self.step < self.budget.num_steps:
            most = self.budget.most_charges
            if most is not None and self.num_charges >= most:
                log.warning(
                    "stopped after step %d of %d: another step would exceed epsilon %g; %d steps were charged",
                    self.step,
                    self.budget.num_steps,
                    self.config.epsilon,
                    self.num_charges,
                )
                return
            self.take_step()
            yield self.step

    def take_step(self) -> None:
        """Charge and take the next step."""
        step, runner, budget = self.step + 1, self.runner, self.budget
        if runner.engine.private:
            write_or_save(self, partial(self._charge, step))
        runner.apply(step)
        rate = learning_rate_at(self.config, step, budget.num_steps)
        runner.optimizer.param_groups[0]["lr"] = rate
        train_step(
            runner.engine,
            runner.optimizer,
            self.losses,
            self.feed.batches(step),
            noise_multiplier=budget.noise_multiplier if runner.engine.private else 0.0,
            expected_batch_size=budget.batch_size,
            generator=self._noise,
            ema=runner.ema,
            on_phase=self._on_phase(step),
            row_to_unit=self.objective.row_to_unit,
        )
        self.step, self.num_taken = step, self.num_taken + 1

    def _charge(self, step: int) -> None:
        """Charge a step in the ledger; of several processes the first does, and the others wait for it."""
        assert self.ledger is not None
        schedule = self.runner.schedule
        self.ledger.charge(
            step=step,
            noise_multiplier=self._accounted_noise,
            sample_rate=self.budget.sample_rate,
            expected_batch_size=self.budget.batch_size,
            max_grad_norm=self.config.max_grad_norm,
            phase="+".join(schedule.phases[schedule.index_at(step)].groups),
        )

    def _on_phase(self, step: int) -> Callable[[str], None]:
        """Return what looks at the noised gradient, on steps that are logged, and counts what was dropped."""
        logged = self.is_logged(step)

        def look(phase: str) -> None:
            self.num_dropped += self.runner.engine.num_dropped
            if logged:
                self.runner.on_phase(phase)

        return look

    def is_logged(self, step: int) -> bool:
        """Return whether a step has a line in the log."""
        return step == 1 or step % self.config.log_every == 0 or step == self.budget.num_steps

    # --- what is said ----------------------------------------------------------------------------------------

    def spent(self, *, exactly: bool) -> Spent | None:
        """Return what was charged, or for the log a bound that costs little; `None` where no epsilon is claimed."""
        if self.ledger is None or not self.config.private or self.config.sampling != "poisson":
            return None
        charged = self.ledger.mechanisms()
        if exactly:
            return self._price.exactly(charged)
        budget = self.budget
        left = budget.num_steps - self.step
        if budget.most_charges is not None:
            left = min(left, budget.most_charges - self.num_charges)
        step = Mechanism(noise_multiplier=self._accounted_noise, sample_rate=budget.sample_rate, num_steps=1)
        return self._price.at_most(charged, step, left)

    def claim(self) -> str:
        """Return what may be said of what was charged, in a line."""
        charged = self.ledger.mechanisms() if self.ledger is not None else []
        return claim(self.config, self.spec, self.budget.num_units, charged)

    def close(self) -> None:
        """Let go of files and threads."""
        self.feed.close()
        self._let_go()

    def _let_go(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        self.runner.engine.detach()
