"""Phases at work: at a border, engine, optimizer and averages change hands between the parameters that train.

Frozen means: no gradient, no noise, no share in the norm, no optimizer state, no decay, and an average that stays as it
is. All of it follows from three facts, which hold from the first step of a phase to the last: a frozen parameter has
`requires_grad` off, so that the engine does not have it; the optimizer does not hold it; `Ema` does not follow it.

**Guarantees**: the mechanism of a step is the engine's, with the same sensitivity C in every phase, so that steps of
all phases compose as they are; the noise of a new phase comes from a generator made for it, never from a state that was
used before. **Edge cases**: a parameter that is frozen and trains again starts without optimizer state, from the
average that it had.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dit_dp.clipping.engine import Engine
from dit_dp.clipping.gathered import reshard
from dit_dp.errors import EngineStateError, UsageError
from dit_dp.training.ema import Ema
from dit_dp.training.groups import add_lora, members, parts_of
from dit_dp.training.schedule import Phase, Schedule

log = logging.getLogger(__name__)

_SPELLED = {"dit": "DiT"}
_RULE = "=" * 80


class PhaseRunner:
    """A model under a schedule: who trains it now, with which optimizer and averages.

    A training loop calls `apply(step)` before each step and then takes `engine`, `optimizer` and `ema` from here, anew
    after each call that returned True::

        runner = PhaseRunner(model, schedule, attach=..., make_optimizer=..., ema_decay=0.9999)
        for step in range(1, num_steps + 1):
            runner.apply(step)
            train_step(runner.engine, runner.optimizer, loss_fn, batches, ema=runner.ema, on_phase=runner.on_phase, ...)
            values = runner.log_values()

    To resume, build it with the number of the last finished step, load the optimizer's state and `load_averages`, and
    go on with `apply(step + 1)`, which crosses a border if one is there. `dit_dp.training.checkpoint.restore` does so.

    Args:
        model: Has `parameter_groups`, or is `DistributedDataParallel` around one that has; given low-rank adapters if
            the schedule has a rank. Parameters outside its groups are fixed and left alone; of all others
            `requires_grad` is set here.
        schedule: What trains when.
        attach: Attaches an engine to the model: `dit_dp.clipping.attach` with its arguments bound. Called once for
            each phase before the first step, so that what a method cannot train is refused then.
        make_optimizer: Makes the optimizer of a list of parameters, which has one parameter group. It stays the same
            object over all phases, so that learning-rate schedulers keep hold of it.
        ema_decay: Of the averages; `None`: there are none.
        step: The step to begin with, or the last one that was finished.

    Attributes:
        model: The model, without a wrapper.
        engine: Attached to the model.
        optimizer: Over the engine's parameters.
        ema: Follows the engine's parameters, or `None`.
        averages: Every average by name, float32: those that `ema` follows and those that rest.
        step: The step that `apply` was last told.

    Raises:
        UsageError: A group that the model has not, or adapters without peft.
        UnsupportedModelError: The method cannot train the model in one of the phases.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        attach: Callable[[nn.Module], Engine],
        make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        ema_decay: float | None = None,
        step: int = 1,
    ) -> None:
        self._index, self.step = schedule.index_at(step), step
        self.schedule, self._attach = schedule, partial(attach, model)
        model = model.module if isinstance(model, DistributedDataParallel) else model
        if schedule.lora_rank is not None:
            add_lora(model, schedule.lora_rank)
        self.model = model
        self._parts = parts_of(model)
        self._trainable = [members(model, phase.groups) for phase in schedule.phases]
        for index in range(len(schedule.phases)):
            if index != self._index:
                self._set_trainable(index)
                self._attach().detach()
        self._set_trainable(self._index)
        self.engine = self._attach()
        self.optimizer = make_optimizer(list(self.engine.parameters.values()))
        self._check_optimizer()
        self.averages: dict[str, Tensor] = {}
        self.ema = None if ema_decay is None else Ema(self.engine.parameters.values(), ema_decay)
        self._note_averages()
        self._gradient_norms: dict[str, Tensor] = {}
        self._announce_start()

    # --- borders --------------------------------------------------------------------------------------------

    def apply(self, step: int) -> bool:
        """Get ready for a step, the first of which is 1.

        Returns:
            Whether a border was crossed, so that `engine` is another one.

        Raises:
            UsageError: No phase has this step.
            EngineStateError: A border, but the engine is in the middle of a step.
        """
        index = self.schedule.index_at(step)
        if index != self._index:
            if self.engine.in_step:
                raise EngineStateError(
                    f"apply: step {step} begins another phase, but the engine is within a step; call zero_grad first"
                )
            self._cross(index)
        crossed, self._index, self.step = index != self._index, index, step
        if crossed:
            self._announce_start()
        return crossed

    def load_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Take the averages of a checkpoint, in place.

        Raises:
            UsageError: One that is followed now is missing.
        """
        if self.ema is None:
            raise UsageError.for_value("averages", f"{len(averages)} tensors", "none", "set an ema_decay to have them")
        missing = [name for name in self.engine.parameters if name not in averages]
        if missing:
            raise UsageError.for_value("averages", f"no {missing[0]}", "one for every parameter that trains")
        for name, average in averages.items():
            if name in self.averages:
                self.averages[name].copy_(average)
            else:
                self.averages[name] = average.to(torch.float32, copy=True)

    def _cross(self, index: int) -> None:
        """Go to another phase: what trains in both keeps its master, optimizer state and average, bit for bit."""
        old = self.engine.parameters
        self.engine.detach()
        self._announce_end(index)
        self._set_trainable(index)
        self.engine = self._attach()
        new = self.engine.parameters
        with torch.no_grad():
            for name in new.keys() & old.keys():
                if new[name] is not old[name]:  # masters of half precision; the model's own are rounded
                    new[name].copy_(old[name])
        state = self.optimizer.state
        kept = {name: state.pop(parameter) for name, parameter in old.items() if parameter in state}
        state.update({new[name]: values for name, values in kept.items() if name in new})
        self.optimizer.param_groups[0]["params"] = list(new.values())
        if self.ema is not None:
            self.ema.follow(list(new.values()), [self.averages.get(name) for name in new])
        self._note_averages()
        self._gradient_norms = {}

    def _set_trainable(self, index: int) -> None:
        """Let the parameters of a phase take gradients, and no other that is not fixed."""
        reshard(self.model)  # it is the shards that are told; what is gathered from them follows
        chosen = set(self._trainable[index])
        for name in {name for names in self._parts.values() for name in names}:
            self.model.get_parameter(name).requires_grad_(name in chosen)

    def _note_averages(self) -> None:
        if self.ema is not None:
            self.averages.update(zip(self.engine.parameters, self.ema.tensors, strict=True))

    def _check_optimizer(self) -> None:
        """Refuse an optimizer whose parameters are not the engine's, in one group."""
        groups = self.optimizer.param_groups
        own = [id(parameter) for parameter in self.engine.parameters.values()]
        if len(groups) != 1 or [id(parameter) for parameter in groups[0]["params"]] != own:
            accepted = "one parameter group with the parameters it was given"
            raise UsageError.for_value("make_optimizer", f"an optimizer of {len(groups)} groups", accepted)

    # --- what a checkpoint asks -----------------------------------------------------------------------------

    @property
    def phase_index(self) -> int:
        """The number, from 0, of the phase that the step belongs to."""
        return self._index

    @property
    def trainable_names(self) -> list[str]:
        """Names of the parameters that train in any phase, in the model's order; all others stay as they are."""
        chosen = {name for names in self._trainable for name in names}
        return [name for name, _ in self.model.named_parameters() if name in chosen]

    # --- what is logged -------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """The phase that the step belongs to."""
        return self.schedule.phases[self._index]

    @property
    def training_mode(self) -> str:
        """``FULL``, ``FROZEN_DiT (step 5000/20000)`` after the parts that rest, or else ``PARTIAL_attention (...)``.

        The second number is the phase's last step, left out where it has none.
        """
        mode = self._mode(self._index)
        steps = f"{self.step}" if self.phase.end is None else f"{self.step}/{self.phase.end}"
        return mode if mode == "FULL" else f"{mode} (step {steps})"

    def on_phase(self, phase: str) -> None:
        """Take the gradients' norms when ``optimizer`` is announced: for `train_step`, on steps that are logged.

        They are of what the optimizer is given: noised, so that they may be published.
        """
        if phase == "optimizer":
            grads = {name: p.grad for name, p in self.engine.parameters.items() if p.grad is not None}
            self._gradient_norms = {
                part: torch.nn.utils.get_total_norm([grads[name] for name in names if name in grads])
                for part, names in self._parts.items()
            }

    def log_values(self, public_contexts: Tensor | None = None) -> dict[str, str | float]:
        """Return what to log of a step.

        Args:
            public_contexts: Contexts (R, ...) of images that are public, such as `SetDiT.context` of drawn ones; those
                of a private batch would be a release that no noise protects.

        Returns:
            ``training_mode``; for each part of the model ``debug/PART_frozen``, 0 or 1, and, if `on_phase` was told of
            the step, ``debug/grad_norm_PART``, 0 when frozen; ``debug/context_mean``, ``_std``, ``_norm`` and
            ``_spread`` (over rows: 0 if every set has the same context).
        """
        frozen = self._frozen(self._index)
        values: dict[str, str | float] = {"training_mode": self.training_mode}
        values |= {f"debug/{part}_frozen": float(part in frozen) for part in self._parts}
        values |= {f"debug/grad_norm_{part}": float(norm) for part, norm in self._gradient_norms.items()}
        if public_contexts is not None:
            rows = public_contexts.detach().flatten(1).float()
            values["debug/context_mean"], values["debug/context_std"] = float(rows.mean()), float(rows.std())
            values["debug/context_norm"] = float(rows.norm(dim=1).mean())
            values["debug/context_spread"] = float(rows.std(0, correction=0).mean())
        return values

    def _frozen(self, index: int) -> list[str]:
        """Return the parts of which nothing trains in a phase."""
        chosen = set(self._trainable[index])
        return [part for part, names in self._parts.items() if chosen.isdisjoint(names)]

    def _mode(self, index: int) -> str:
        """Return in a word what a phase trains: everything, whole parts, or what cuts across them."""
        frozen, count = self._frozen(index), len(self._trainable[index])
        if count == sum(len(names) for part, names in self._parts.items() if part not in frozen):
            if not frozen:
                return "FULL"
            return "FROZEN_" + "+".join(_SPELLED.get(part, part) for part in frozen)
        return "PARTIAL_" + "+".join(self.schedule.phases[index].groups)

    def _announce_start(self) -> None:
        """Say that a phase begins, in lines that stand out, unless all trains from the first step to the last."""
        if len(self.schedule.phases) == 1 and self._mode(self._index) == "FULL":
            return
        until = "on" if self.phase.end is None else f"to {self.phase.end}"
        counts = [sum(p.numel() for p in self.engine.model_parameters.values())]
        counts.append(sum(self.model.get_parameter(name).numel() for names in self._parts.values() for name in names))
        mode, groups = self._mode(self._index), ", ".join(self.phase.groups)
        trains = f"{counts[0]:,} of {counts[1]:,} parameters train"
        log.info("%s\n%s from step %d %s: %s; %s\n%s", _RULE, mode, self.step, until, groups, trains, _RULE)

    def _announce_end(self, index: int) -> None:
        """Say that a freeze ends."""
        thawed = [part for part in self._frozen(self._index) if part not in self._frozen(index)]
        names = ", ".join(_SPELLED.get(part, part) for part in thawed)
        news = f"; unfrozen: {names}" if thawed else ""
        log.info("%s\n%s ends after step %d%s\n%s", _RULE, self._mode(self._index), self.step, news, _RULE)
