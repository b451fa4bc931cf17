"""Checkpoints of a run in phases: written from a `PhaseRunner`, and put back into one bit for bit.

Tensors are safetensors and what is said of the run is JSON, so that reading a checkpoint runs nothing that is in it.
Parameters, optimizer state and averages are kept by name, whole and unrounded: of half-precision models the float32
masters, under FSDP2 full tensors. A run may therefore go on with replicas where it had shards, and the reverse.

What is never kept is the state of a random generator. A resumed run draws fresh entropy for noise and sampling, and the
ledger charges the steps that were made after the checkpoint: their noise was or may have been released.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_dp.errors import CheckpointError, EngineStateError, UsageError
from dit_dp.models.files import listing, load_into, stored_tensors
from dit_dp.training.checkpoint_files import (
    Checkpoint,
    Draft,
    check_folder,
    check_keep,
    inspect,
    latest,
    load,
    prune,
)
from dit_dp.training.checkpoint_state import EMA, MODEL, OPTIMIZER, CheckpointState, PrivacyFacts
from dit_dp.training.phases import PhaseRunner

log = logging.getLogger(__name__)

__all__ = [
    "Checkpoint",
    "CheckpointState",
    "PrivacyFacts",
    "base_digest",
    "check_folder",
    "latest",
    "load",
    "load_trained",
    "restore",
    "save",
    "trained_weights",
]

_KINDS: dict[type[torch.optim.Optimizer], tuple[set[str], set[str]]] = {
    torch.optim.Adam: ({"step", "exp_avg", "exp_avg_sq"}, {"max_exp_avg_sq"}),
    torch.optim.SGD: ({"momentum_buffer"}, set()),
}
"""Of an optimizer, AdamW's being Adam's: the state that a parameter has once it was updated, and what it may have."""


def base_digest(runner: PhaseRunner) -> str:
    """Return the sha256, by name and content, of all weights that no phase trains: they are the same in every step.

    Under FSDP2 a collective call.
    """
    trained = set(runner.trainable_names)
    return _digest({name: t for name, t in stored_tensors(runner.model).items() if name not in trained})


def save(
    folder: Path | str, runner: PhaseRunner, state: CheckpointState, *, keep: int = 3, trainable_only: bool = False
) -> Path:
    """Write a checkpoint, then delete those before the newest `keep`. On several ranks all call it, the first writes.

    Args:
        folder: Of the checkpoints of this run, on a file system that every rank sees; made if it is not there.
        runner: Between two steps.
        state: With the last finished step and its phase; `trainable_only` is set here.
        keep: How many whole checkpoints to keep, at least 1.
        trainable_only: Leave out what no phase trains: `state.base_sha256` says which weights it belongs to.

    Returns:
        The folder of the checkpoint. If it was written before, at the same state, nothing is written.

    Raises:
        CheckpointError: It cannot be written (full disk, no permission), or a whole checkpoint of that step but another
            state is there. On every rank; all checkpoints before it are as they were.
        EngineStateError: In the middle of a step.
        UsageError: A state of another phase than the runner's, or an optimizer whose state is no tensors.
    """
    check_keep(keep)
    _require_rest(runner, "save")
    if state.phase != runner.phase_index:
        raise UsageError.for_value("state.phase", state.phase, f"{runner.phase_index}, the phase of the runner")
    state = replace(state, trainable_only=trainable_only)
    folder, ranks = Path(folder), runner.engine.ranks
    path = folder / f"step-{state.step:08d}"
    if any(ranks.gather(ranks.is_first and _is_saved(path, state))):
        return path
    failure = _write(folder, runner, state)
    reasons = [reason for reason in ranks.gather(str(failure or "")) if reason]
    if reasons:
        raise failure or CheckpointError(reasons[0])
    if ranks.is_first:
        prune(folder, keep)
    log.info("checkpoint: wrote %s", path)
    return path


def restore(checkpoint: Checkpoint, runner: PhaseRunner, here: CheckpointState) -> None:
    """Put parameters, optimizer state and averages back, bit for bit; all of it fits, or nothing is changed.

    On several ranks each calls it with the same checkpoint.

    Args:
        checkpoint: From `load`.
        runner: Built anew as for the run that wrote it, with ``step=max(checkpoint.state.step, 1)``. Go on with
            ``apply(checkpoint.state.step + 1)``, which crosses a border if one is there.
        here: What this run would write of itself; step, phase and what was charged are not compared.

    Raises:
        UsageError: Another data set, noise multiplier, sample rate, workload, base weights or other condition: lists
            what differs. Or the runner is in another phase.
        CheckpointError: The tensors are not those that the runner has.
        EngineStateError: In the middle of a step.
    """
    _require_rest(runner, "restore")
    state = checkpoint.state
    state.require_same_run(here)
    step = max(state.step, 1)
    if _phase_at(runner, step) != state.phase:
        raise CheckpointError(f"checkpoint: {checkpoint.path} says step {step} is of phase {state.phase}; it is not")
    if runner.phase_index != state.phase:
        raise UsageError(f"restore: the runner is in phase {runner.phase_index}; build it with step={step}")
    _check_model(checkpoint, runner)
    _check_averages(checkpoint, runner)
    by_name = _check_optimizer(checkpoint, runner)
    _restore_model(checkpoint, runner)
    _restore_optimizer(by_name, runner)
    if checkpoint.averages is not None:
        masters = {**dict(runner.model.named_parameters()), **runner.engine.parameters}
        runner.load_averages({name: _placed(tensor, masters[name]) for name, tensor in checkpoint.averages.items()})
    runner.step = step
    log.info("checkpoint: resumed from %s", checkpoint.path)


def trained_weights(checkpoint: Checkpoint, *, averaged: bool = True) -> dict[str, Tensor]:
    """Return a checkpoint's weights by name: all, or those that some phase trains.

    Args:
        checkpoint: From `load`.
        averaged: Take averages for weights that have one: what samples are drawn from.

    Raises:
        UsageError: Averages are asked for and there are none.
    """
    if averaged and checkpoint.averages is None:
        raise UsageError.for_value("averaged", True, "False", f"{checkpoint.path} has no averages")
    return {**checkpoint.model, **((checkpoint.averages if averaged else None) or {})}


def load_trained(model: nn.Module, checkpoint: Checkpoint, *, averaged: bool = True) -> None:
    """Put a checkpoint's weights into a model, in place: all, or what was trained over the base weights it has.

    Args:
        model: Of the checkpoint's workload, not sharded; with adapters if the schedule has them, and with the base
            weights, in the dtype of training, if the checkpoint is `trainable_only`.
        checkpoint: From `load`.
        averaged: As for `trained_weights`.

    Raises:
        CheckpointError: Names or shapes do not fit, or the base weights are others than the run's.
    """
    tensors = trained_weights(checkpoint, averaged=averaged)
    if not checkpoint.state.trainable_only:
        load_into(model, tensors)
        return
    own = stored_tensors(model)
    base = {name: tensor for name, tensor in own.items() if name not in tensors}
    if tensors.keys() <= own.keys() and _digest(base) != checkpoint.state.base_sha256:
        raise CheckpointError(
            f"checkpoint: {checkpoint.path} was trained on other base weights than the model has; load those first"
        )
    load_into(model, {**base, **tensors})


# --- writing --------------------------------------------------------------------------------------------------


def _is_saved(path: Path, state: CheckpointState) -> bool:
    """Return whether a whole checkpoint of the same state is there."""
    try:
        return path.is_dir() and inspect(path).state == state
    except CheckpointError:
        return False


def _write(folder: Path, runner: PhaseRunner, state: CheckpointState) -> CheckpointError | None:
    """Return why the first rank could not write, if so; whether it can or not, all ranks gather to the end."""
    draft = Draft(folder, state) if runner.engine.ranks.is_first else None
    failure: CheckpointError | None = None
    with draft or contextlib.nullcontext():
        for name, tensors in _parts(runner, state.trainable_only):
            whole = _gathered(tensors, keep=draft is not None and failure is None)
            if draft is not None and failure is None:
                failure = _failure_of(draft.add, name, whole)
        if draft is not None and failure is None:
            failure = _failure_of(draft.commit)
    return failure


def _failure_of(action: Callable[..., object], *arguments: object) -> CheckpointError | None:
    """Return what a call raises."""
    try:
        action(*arguments)
    except CheckpointError as error:
        return error
    return None


def _parts(runner: PhaseRunner, trainable_only: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each file's name with what belongs into it."""
    stored, masters = stored_tensors(runner.model), runner.engine.parameters
    names = runner.trainable_names if trainable_only else stored
    yield MODEL, {name: masters.get(name, stored[name]) for name in names}
    if runner.ema is not None:
        yield EMA, runner.averages
    yield OPTIMIZER, _optimizer_state(runner)


def _optimizer_state(runner: PhaseRunner) -> dict[str, Tensor]:
    """Return the optimizer's state by ``KIND/NAME``."""
    found = {}
    for name, parameter in runner.engine.parameters.items():
        for kind, value in runner.optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                accepted = "tensors alone: AdamW, Adam or SGD"
                raise UsageError.for_value(f"optimizer: state {kind!r}", type(value).__name__, accepted)
            found[f"{kind}/{name}"] = value
    return found


def _gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return tensors at full shape on the CPU, or drop them; one at a time, and under FSDP2 every rank takes part."""
    found = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor)
        if keep:
            found[name] = _on_host(whole)
    return found


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _on_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, contiguous, with memory of its own."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and contents, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _whole(tensors[name]).cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


# --- reading --------------------------------------------------------------------------------------------------


def _require_rest(runner: PhaseRunner, caller: str) -> None:
    if runner.engine.in_step:
        raise EngineStateError(f"{caller}: the engine is within a step; call zero_grad first")


def _phase_at(runner: PhaseRunner, step: int) -> int | None:
    """Return the number of a step's phase, or `None` where the schedule has ended."""
    try:
        return runner.schedule.index_at(step)
    except UsageError:
        return None


def _check_model(checkpoint: Checkpoint, runner: PhaseRunner) -> None:
    """Refuse weights that are not the runner's."""
    stored, masters = stored_tensors(runner.model), runner.engine.parameters
    names = runner.trainable_names if checkpoint.state.trainable_only else list(stored)
    _check_names(checkpoint, MODEL, checkpoint.model, names)
    for name in names:
        like = masters.get(name, stored[name])
        _check_like(checkpoint, MODEL, name, checkpoint.model[name], like.shape, like.dtype)


def _check_averages(checkpoint: Checkpoint, runner: PhaseRunner) -> None:
    """Refuse averages that are not the runner's."""
    if (runner.ema is None) != (checkpoint.averages is None):
        there = "no averages" if checkpoint.averages is None else "averages"
        raise UsageError(f"resume: ema_decay: {checkpoint.path} has {there}, and this run is set otherwise")
    if checkpoint.averages is None:
        return
    known = set(runner.trainable_names)
    _check_names(checkpoint, EMA, checkpoint.averages, [*runner.averages, *(known & checkpoint.averages.keys())])
    for name, average in checkpoint.averages.items():
        _check_like(checkpoint, EMA, name, average, runner.model.get_parameter(name).shape, torch.float32)


def _check_optimizer(checkpoint: Checkpoint, runner: PhaseRunner) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state by name and kind; refuse what is not the runner's."""
    masters = runner.engine.parameters
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimizer.items():
        kind, _, name = key.partition("/")
        if name not in masters:
            _refuse(checkpoint, OPTIMIZER, f"{key!a} is of no parameter that trains in this phase")
        shape = () if kind == "step" else masters[name].shape
        _check_like(checkpoint, OPTIMIZER, key, value, shape, masters[name].dtype if shape else torch.float32)
        by_name.setdefault(name, {})[kind] = value
    for optimizer, (needed, allowed) in _KINDS.items():
        if isinstance(runner.optimizer, optimizer):
            for name, state in by_name.items():
                if not needed <= state.keys() <= needed | allowed:
                    what = f"the state of {name} is {listing(sorted(state))!a}, not {listing(sorted(needed))}"
                    _refuse(checkpoint, OPTIMIZER, what)
    return by_name


def _restore_model(checkpoint: Checkpoint, runner: PhaseRunner) -> None:
    """Write what some phase trains: masters as they were, and the model's own, rounded where they are not the same."""
    masters = runner.engine.parameters
    own = {**dict(runner.model.named_parameters()), **runner.engine.model_parameters}
    with torch.no_grad():
        for name in runner.trainable_names:
            for target in {id(p): p for p in (masters.get(name, own[name]), own[name])}.values():
                target.copy_(_placed(checkpoint.model[name], target))


def _restore_optimizer(by_name: Mapping[str, Mapping[str, Tensor]], runner: PhaseRunner) -> None:
    """Set the state; `load_state_dict` would match by order and may convert."""
    group = runner.optimizer.param_groups[0]
    counts_on_device = bool(group.get("fused") or group.get("capturable"))
    runner.optimizer.state.clear()
    for name, state in by_name.items():
        parameter = runner.engine.parameters[name]
        for kind, value in state.items():
            if kind == "step":
                placed = value.to(parameter.device if counts_on_device else "cpu", copy=True)
            else:
                placed = _placed(value, parameter)
            runner.optimizer.state[parameter][kind] = placed


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a copy of a full tensor where `like` is, in shards if `like` is; nothing is sent."""
    copied = tensor.to(like.device, copy=True)
    if not hasattr(like, "device_mesh"):
        return copied
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    placed: Tensor = distribute_tensor(copied, like.device_mesh, like.placements, src_data_rank=None)
    return placed


def _check_names(checkpoint: Checkpoint, file: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    found, wanted = set(found), set(wanted)
    if found != wanted:
        problems = {"missing": sorted(wanted - found), "unexpected": sorted(found - wanted)}
        texts = [f"{len(names)} {what} ({listing(names)!a})" for what, names in problems.items() if names]
        _refuse(checkpoint, file, "; ".join(texts))


def _check_like(
    checkpoint: Checkpoint, file: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        wanted = f"{tuple(shape)} of {dtype}"
        _refuse(checkpoint, file, f"{name!a} is {tuple(tensor.shape)} of {tensor.dtype} where {wanted} belongs")


def _refuse(checkpoint: Checkpoint, file: str, reason: str) -> None:
    raise CheckpointError(f"checkpoint: {checkpoint.path / file} does not fit the run: {reason}")
