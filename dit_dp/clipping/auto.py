"""The fastest exact clipping within a memory budget: rules per weight, physical batch, recomputed blocks.

Before the first step, trials of one unit and of two show what lives when (`probe`), rules are timed at the model's own
shapes (`costs`), and a plan is made (`planner`): with room, every weight takes its fastest rule, and a step costs
ordinary training's operations and the norms'; with less, weights that save most bytes a second lost change theirs, then
the batch is taken in smaller parts, and where not even one unit fits, blocks are recomputed, as few as will do.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.clipping.batch import Batch, LossFn, tensors_of
from dit_dp.clipping.bookkeeping import BookRule
from dit_dp.clipping.contributions import Direct, Outer
from dit_dp.clipping.costs import measured
from dit_dp.clipping.coverage import covered
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.lean import LeanEngine
from dit_dp.clipping.planner import Plan, Step, make_plan
from dit_dp.clipping.precision import is_full_float32
from dit_dp.clipping.raw import raw_parameters
from dit_dp.clipping.units import Units
from dit_dp.clipping.watched import WatchedLayer
from dit_dp.errors import EngineStateError, UsageError

FREE_SHARE = 0.9
"""Share of the free memory that the default budget takes."""

ADAM_BYTES = 8
"""Optimizer state a parameter: two float32 moments."""


class AutoEngine(LeanEngine):
    """Exact flat clipping by the fastest plan within a budget; the plan is in `choices`.

    Performance settings:
        memory_budget: Bytes that a step may reach at its peak, parameters, gradients and optimizer state included;
            default: what is held now and 90 % of what is free.
        optimizer_bytes: Optimizer state, bytes per parameter; Adam has 8, plain SGD 0.

    Units of later batches are taken in parts no larger than planned. The peak is predicted from storages: temporaries
    inside an operation are not seen (on CPU and CUDA below 1 % of a step for transformers).

    **Guarantees** and **edge cases**: as in `lean`, whatever the plan.
    """

    method: ClassVar[str] = "auto"
    unfolds_trials: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        on_phase: Callable[[str], None] | None = None,
        memory_budget: int | None = None,
        optimizer_bytes: int = ADAM_BYTES,
    ) -> None:
        if memory_budget is not None:
            validate.integer("memory_budget", memory_budget, fix="give bytes")
        validate.integer("optimizer_bytes", optimizer_bytes, minimum=0)
        self.memory_budget, self.optimizer_bytes = memory_budget, optimizer_bytes
        super().__init__(model, max_grad_norm=max_grad_norm, on_phase=on_phase)

    def _attach(self) -> None:
        super()._attach()
        self._plan: Plan | None = None
        self._planned: object = None
        self._split = False
        self._budget = 0
        self._updated = False
        self._left: dict[nn.Parameter, WatchedLayer] = {}

    def _choose_blocks(self) -> None:
        for block in self.blocks:
            block.stored = block.booked = True

    def backward(self, losses: Tensor) -> Tensor | None:
        """Clip a forward that the caller ran, unless the plan is to take the batch in parts."""
        if self._plan is not None and self._plan.physical_batch < losses.shape[0]:
            raise EngineStateError(
                f"backward: auto takes {self._plan.physical_batch} units at a time to stay within its budget, so it "
                f"runs the forward itself; call accumulate"
            )
        return super().backward(losses)

    def _take(self, loss_fn: LossFn, batch: Batch, units: Units) -> Tensor | None:
        """Take the batch in the plan's parts."""
        if not self._trials:  # they failed, and the whole batch is run to say why
            return super()._take(loss_fn, batch, units)
        plan = self._plan_for(loss_fn, batch, units)
        norms = []
        with self._some_unwatched():
            for index in hardware().rounds(-(-units.num_units // plan.physical_batch)):
                start = index * plan.physical_batch
                if index:
                    self._announce("forward")
                part, some = units.take(batch, start, min(start + plan.physical_batch, units.num_units))
                norms.append(super()._take(loss_fn, part, some))
        return torch.cat([norm for norm in norms if norm is not None])

    # --- one unit at a time ---------------------------------------------------------------------------------

    def _left_to_autograd(self, plan: Plan) -> list[WatchedLayer]:
        """Return the layers whose gradients autograd forms as well as we do: kept ones, of one unit alone.

        Watching takes a CPU's interpreter 0.1 ms a call, 3 % of a unit of DiT-S; a GPU has work queued meanwhile. Not
        what autograd rounds to half precision, what is recomputed, and what other ranks would hear of.
        """
        blocks, first = len(self.blocks), next(iter(self.model_parameters.values()))
        if plan.physical_batch > 1 or plan.booked < blocks or plan.stored < blocks:
            return []
        if first.device.type != "cpu" or not self.ranks.alone:
            return []
        half = {call.name for call in self._trials[-1].weights if call.element_size < 4}
        users = Counter(p for layer in self._layers for p in layer.trainable())
        users.update(raw_parameters(self.model, covered).values())
        return [
            layer
            for layer in self._layers
            if layer.weight is not None and self._names.get(layer.weight) in plan.keep - half
            if all(users[p] == 1 for p in layer.trainable())
        ]

    @contextlib.contextmanager
    def _some_unwatched(self) -> Iterator[None]:
        """Have layers that are left to autograd run as if nobody watched, if it is exact and tells nobody."""
        heard = {layer for parameter, layer in self._left.items() if _has_hooks(parameter)}
        layers = set(self._left.values()) - heard if is_full_float32() else set()
        try:
            for layer in layers:
                layer.is_watched = False
            yield
        finally:
            for layer in layers:
                layer.is_watched = True

    def _take_past(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Keep a gradient that was left to autograd."""
        if parameter not in self._left or self._left[parameter].is_watched:
            return super()._take_past(parameter, gradient)
        kept = Direct(gradient[None])
        if parameter.dim() == 1:
            return self.receive(parameter, kept)
        assert self._squares is not None
        self._squares += kept.rowwise_squared_norms()
        self._rules_used[self._names[parameter]] = "keep"
        self._booked[parameter] = [True]
        return self._note(parameter, [kept])

    # --- the plan -------------------------------------------------------------------------------------------

    def _plan_for(self, loss_fn: LossFn, batch: Batch, units: Units) -> Plan:
        """Return the plan; make one for the first batch, for rows of other shapes, and for more units than fit one."""
        rows = tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors_of(batch))
        plan = self._plan
        if plan is not None and rows == self._planned and (units.num_units <= plan.physical_batch or self._split):
            return plan
        if plan is not None:
            self._try(loss_fn, batch, units)
        plan = self._make_plan(batch, units)
        self.follow(plan)
        self._planned, self._split = rows, plan.physical_batch < units.num_units
        return plan

    @property
    def plan(self) -> Plan | None:
        """What is followed; `None` before the first step."""
        return self._plan

    def follow(self, plan: Plan) -> None:
        """Take another plan for batches like the last, between steps: for comparisons."""
        self._plan, self._split = plan, True
        self._left = {parameter: layer for layer in self._left_to_autograd(plan) for parameter in layer.trainable()}
        for index, block in enumerate(self.blocks):
            block.booked = index < plan.booked
            block.stored = index >= len(self.blocks) - plan.stored

    def known(self, batch: Batch, units: Units) -> Step:
        """Return what plans for a batch are made from, after a step."""
        held = [*self.model.parameters(), *self.model.buffers(), *tensors_of(batch)]
        masters = [p for name, p in self.parameters.items() if p is not self.model_parameters[name]]
        static = sum(t.numel() * t.element_size() for t in (*held, *masters))
        static += sum(p.numel() for p in self.parameters.values()) * self.optimizer_bytes
        return Step(
            trials=self._trials,
            blocks=tuple(block.name for block in self.blocks),
            parameter_bytes={name: p.numel() * p.element_size() for name, p in self.parameters.items()},
            static_bytes=static,
            num_units=units.num_units,
        )

    def _make_plan(self, batch: Batch, units: Units) -> Plan:
        step = self.known(batch, units)
        first = next(iter(self.model_parameters.values()))
        self._budget = self.memory_budget or self._held(step) + int(FREE_SHARE * hardware().free_bytes(first.device))
        plan = make_plan(step, self._budget, hardware().rule_seconds or measured(first.device, first.dtype))
        if self.memory_budget is not None and plan.peak_bytes > self.memory_budget:
            raise UsageError.for_value(
                "memory_budget",
                self.memory_budget,
                f">= {plan.peak_bytes} bytes, which the leanest plan is predicted to take, "
                f"{plan.peak_bytes - self.memory_budget} more",
                "or make the model or its input smaller",
            )
        return plan

    def _held(self, step: Step) -> int:
        """Return what a step holds all the time and is not free now: before the first update, no optimizer state."""
        if self._updated:
            return step.static_bytes
        return step.static_bytes - sum(p.numel() for p in self.parameters.values()) * self.optimizer_bytes

    def zero_grad(self) -> None:
        """Clear gradients; after a release, the optimizer has made its state."""
        self._updated = self._updated or self._state == "privatized"
        super().zero_grad()

    def _rule_for(self, parameter: nn.Parameter, outers: list[Outer]) -> BookRule:
        name = self._names[parameter]
        if self._plan is None or name not in self._plan.norms:  # one position a unit in the trials, maybe more here
            return super()._rule_for(parameter, outers)
        if name in self._plan.keep and all(self._booked[parameter]):
            return "keep"
        return self._plan.norms[name]

    def choices(self) -> dict[str, Any]:
        """Return the plan: rules, physical batch, blocks, predicted peak and budget."""
        if self._plan is None:
            return super().choices()
        return {
            **super().choices(),
            "physical_batch": self._plan.physical_batch,
            "memory_budget_bytes": self._budget,
            "predicted_peak_bytes": self._plan.peak_bytes,
        }


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Return whether somebody else hears of a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
