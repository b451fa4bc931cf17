"""A trial of one or two units before the first step: do they keep apart, and what lives when.

Runs the real forward and backward of the first units of the first batch, without booking anything, under a dispatch
mode that logs the birth and death of every storage. Trials of one unit and of two tell which sizes grow with the batch.
Blocks are recomputed, so that a trial takes no more memory than the leanest step, and `unfolded` says what they would
have held.
"""

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dit_dp.clipping.apart import nonzero_rows, require_apart
from dit_dp.clipping.batch import Batch, LossFn, check_losses, map_tensors, num_rows
from dit_dp.clipping.contributions import Contribution, Outer
from dit_dp.clipping.hardware import hardware
from dit_dp.clipping.lives import Life, Trial, WeightCall
from dit_dp.clipping.unfolded import Visit, unfolded
from dit_dp.clipping.units import ROW_TO_UNIT, Units
from dit_dp.errors import CoupledExamplesError, UsageError

log = logging.getLogger(__name__)


class StorageLog(TorchDispatchMode):  # type: ignore[misc]
    """Logs the birth and death of storages that operations return; an instant is an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.lives: list[Life] = []
        self.now = 0
        self._known: dict[int, tuple[int, Any]] = {}

    def index(self, tensor: Tensor) -> int | None:
        """Return the index of a tensor's storage in `lives`, or `None` if it is older than the log."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _DEVICE:  # what a tensor without data asks at every turn
            return out
        self.now += 1
        if _is_view(func):
            return out
        for tensor in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and not _is_older(storage, func, args, kwargs):
                    self._see(storage)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have no compiler kept out at every call: a trial runs what is compiled as it was written."""
        return False

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if storage.nbytes() == 0:
            return
        index = len(self.lives)
        self.lives.append(Life(storage.nbytes(), self.now))
        self._known[key] = (index, weakref.ref(storage, lambda _, k=key, i=index: self._bury(k, i)))  # type: ignore[misc]

    def _bury(self, key: int, index: int) -> None:
        if self._known.get(key, (None,))[0] == index:
            del self._known[key]
            self.lives[index].dies = self.now + 1


_DEVICE = torch.ops.prim.device.default


@cache
def _is_view(func: Any) -> bool:
    """Return whether an operation makes no storage."""
    return isinstance(func, OpOverload) and bool(func.is_view)


def _is_older(storage: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Return whether a result's storage is an argument's: of what writes into arguments, or says too little."""
    if isinstance(func, OpOverload) and not func._schema.is_mutable and func._schema.name not in _SILENT_VIEWS:
        return False
    older = (t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    return storage._cdata in older


_SILENT_VIEWS = ("aten::_unsafe_view", "aten::unsafe_split", "aten::unsafe_split_with_sizes", "aten::lift")
"""Return an argument's storage though their schemas do not say so."""


class Prober:
    """Runs trials for an engine whose layers report to `saw` meanwhile.

    Args:
        names: Name of each parameter.
        attached: Called with the prober, or `None`, to make layers report to it, or no more.
        all_agree: Returns whether what is given is true on every rank: those that run in step make the same passes.
        unfolds: Whether what kept graphs would have held is wanted; if not, of units together the forward says all.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        attached: "Callable[[Prober | None], None]",
        all_agree: Callable[[bool], bool],
        *,
        unfolds: bool = False,
    ) -> None:
        self._names, self._attached, self._all_agree = names, attached, all_agree
        self._log = StorageLog()
        self._trial = Trial(0)
        self._visits: list[Visit] = []
        self._alone: int | None = None
        self._recomputes, self._unfolds = True, unfolds

    def run(self, model: nn.Module, loss_fn: LossFn, batch: Batch, units: Units, count: int, *, alone: bool) -> Trial:
        """Take the first `count` units through the forward, and the backward if more is wanted than blocks' inputs.

        Args:
            model: With layers under watch.
            loss_fn: Per-unit losses.
            batch: At least `count` units.
            units: Which rows are whose.
            count: How many take part.
            alone: Differentiate one unit's loss after the other's, instead of all together, and see that nothing
                reaches anybody else's rows.

        Returns:
            What was seen, told as if every graph had been kept if that is wanted; of units alone as it was.

        Raises:
            CoupledExamplesError: One unit's loss depends on another's rows.
        """
        for _ in range(2):  # a cache that is filled on the way makes another forward than recomputation
            try:
                trial = self._pass(model, loss_fn, batch, units, count, alone=alone)
            except (UsageError, torch.OutOfMemoryError):
                raise
            except RuntimeError:  # a block that cannot be recomputed, such as one whose input is changed in place later
                break
            found = unfolded(trial, self._visits) if self._unfolds and not alone else trial
            if found is not None:
                return found
        log.info("trial: blocks keep their graphs, since recomputing them is not the same again")
        self._recomputes = False
        return self._pass(model, loss_fn, batch, units, count, alone=alone)

    def _pass(self, model: nn.Module, loss_fn: LossFn, batch: Batch, units: Units, count: int, *, alone: bool) -> Trial:
        part, some = units.take(batch, 0, count)
        self._log, self._trial, self._visits = StorageLog(), Trial(count), []
        inputs = _leaves(part) if alone else []
        if alone:
            part = map_tensors(lambda t: t * 1 if t.requires_grad else t, _with(part, inputs))
        self._attached(self)
        try:
            with self._fork(model), self._log, torch.enable_grad():
                losses = loss_fn(model, part)
                check_losses(losses, count)
                self._trial.backward = self._log.now
                if not alone:
                    if self._unfolds:
                        torch.autograd.backward(losses, torch.ones_like(losses))
                elif self._all_agree(hardware().holds(torch.isfinite(losses).all(), usually=True)):
                    self._differentiate_each(losses, inputs, some)
        finally:
            self._alone = None
            self._attached(None)
        trial = self._trial
        trial.end, trial.lives = self._log.now + 1, self._log.lives
        return trial

    def _differentiate_each(self, losses: Tensor, inputs: list[Tensor | None], units: Units) -> None:
        """Differentiate one unit's loss after the other's; layers report rows that are reached."""

        def differentiate(loss: Tensor) -> None:
            torch.autograd.backward(loss, retain_graph=True)
            for tensor in inputs:
                if tensor is not None and tensor.grad is not None:
                    self._check_alone("the batch", units.gather(tensor.grad))
                    tensor.grad = None

        for unit in range(len(losses)):
            self._alone = unit
            hardware().apply(differentiate, losses[unit])

    def compare(self, model: nn.Module, loss_fn: LossFn, batch: Batch, units: Units) -> None:
        """Exchange the rows of one unit of two; the other's loss must not change by a bit.

        Finds what gradients do not: a dependence that goes through a detached or rounded value.

        Raises:
            CoupledExamplesError: It changes.
        """
        rows = [units.take(batch, unit, unit + 1)[0] for unit in range(2)]
        pair, some = units.take(batch, 0, 2)
        pair = map_tensors(torch.clone, pair)  # fresh memory as the twins': rounding may go by alignment
        alike = some.num_rows == 2 * num_rows(rows[0]) and (some.row_to_unit is None or some.adjacent)
        if not self._all_agree(alike):
            return  # units of different sizes cannot stand for each other
        twins = [map_tensors(lambda t: torch.cat([t, t]), each) for each in rows]
        if isinstance(pair, Mapping) and ROW_TO_UNIT in pair:
            twins = [{**twin, ROW_TO_UNIT: pair[ROW_TO_UNIT]} for twin in twins]  # type: ignore[dict-item]

        def forward(rows: Batch) -> Tensor:
            return loss_fn(model, rows).detach()

        with self._fork(model), torch.no_grad(), warnings.catch_warnings():
            # Reentrant checkpointing warns, wherever no gradient is wanted, that there will be none.
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
            both, *twice, again = [hardware().apply(forward, each) for each in (pair, *twins, pair)]
            for unit in range(2):
                if _differ(both[unit], twice[unit][unit]) and not _differ(both, again):
                    raise CoupledExamplesError(
                        f"model: the loss of one example changes from {float(both[unit]):.6g} to "
                        f"{float(twice[unit][unit]):.6g} when another's rows are exchanged, so no per-example gradient "
                        f"exists; take out what mixes the batch, such as BatchNorm or a mean over the first dimension"
                    )

    @contextlib.contextmanager
    def _fork(self, model: nn.Module) -> Iterator[None]:
        """Leave random states and gradients as they were."""
        devices = sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
        gradients = {p: p.grad for p in model.parameters()}
        with torch.random.fork_rng(devices):
            yield
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _check_alone(self, where: str, gradient: Tensor) -> None:
        """Refuse a gradient, (U, ...), of one unit's loss that reaches others' rows."""
        if self._alone is not None:
            require_apart(self._alone, where, gradient)

    # --- called while a trial runs ----------------------------------------------------------------------------

    def saw(self, parameter: nn.Parameter, part: Contribution) -> None:
        """Take note of one call's contribution, (U, ...)."""
        name = self._names[parameter]
        self._check_alone(f"parameter {name}", nonzero_rows(part))
        if isinstance(part, Outer):
            self._trial.weights.append(
                WeightCall(
                    name=name,
                    positions=part.a.shape[1],
                    width=part.a.shape[2],
                    out_width=part.g.shape[2],
                    element_size=part.a.element_size(),
                    instant=self._log.now,
                    operands=(self._log.index(part.a), self._log.index(part.g)),
                )
            )

    def block(
        self, name: str, forward: Callable[..., Any], leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block, whose graph is not kept; take note of when, and of its inputs' first dimensions."""
        trial, log, visits = self._trial, self._log, self._visits
        trial.leading[name] = tuple(
            leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves
        )
        found = [log.index(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        trial.inputs[name] = tuple(index for index in found if index is not None)
        call = len(trial.windows)

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = log.now
            out = forward(*args, **kwargs)
            if all(visit.call != call for visit in visits):
                trial.windows.append((name, begin, log.now))
            visits.append(Visit(call, begin, log.now))
            return out

        if not self._recomputes or _in_checkpoint():
            return run(*args, **kwargs)
        with set_checkpoint_early_stop(False):
            return checkpoint(partial(run, **kwargs), *args, use_reentrant=False)


def _in_checkpoint() -> bool:
    """Return whether the model does not keep the graph here by itself: it checkpoints, or recomputes what it did."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or torch._C._current_graph_task_id() != -1


def _differ(one: Tensor, other: Tensor) -> bool:
    """Return whether two losses are not the same bits; not a number is one."""
    return hardware().holds((one.nan_to_num() != other.nan_to_num()).any(), usually=False)


def _leaves(batch: Batch) -> list[Tensor | None]:
    """Return, for every floating-point tensor of a batch, a leaf that takes its gradient."""
    tensors = batch.values() if hasattr(batch, "values") else batch
    return [t.detach().requires_grad_() if t.is_floating_point() else None for t in tensors]


def _with(batch: Batch, leaves: list[Tensor | None]) -> Batch:
    """Return the batch with its floating-point tensors replaced."""
    pending = iter(leaves)

    def choose(tensor: Tensor) -> Tensor:
        leaf = next(pending)
        return tensor if leaf is None else leaf

    return map_tensors(choose, batch)
