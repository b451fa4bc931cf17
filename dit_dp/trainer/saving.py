"""Where a run's weights come from, and its checkpoints."""

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dit_dp.errors import CheckpointError, UsageError
from dit_dp.models.files import load_into, load_weights
from dit_dp.models.weights import diffusers_to_reference
from dit_dp.privacy import Position
from dit_dp.trainer.config import TrainConfig
from dit_dp.training import checkpoint as checkpoints
from dit_dp.training.checkpoint_state import STATE
from dit_dp.training.groups import members
from dit_dp.workloads import WorkloadSpec, build_model

if TYPE_CHECKING:
    from dit_dp.trainer.trainer import Trainer

log = logging.getLogger(__name__)

FOLDER = "checkpoints"


def starting_model(config: TrainConfig, spec: WorkloadSpec) -> nn.Module:
    """Return the model of a run before its first step: seeded, then with the weights that were asked for.

    Of a published file, weights may be missing only where they train: such as a branch that is new.

    Raises:
        UsageError: Weights that cannot be read or do not fit.
    """
    torch.manual_seed(config.init_seed)
    return _with_weights(spec, config.weights)


def _with_weights(spec: WorkloadSpec, weights: Path | None) -> nn.Module:
    """Return a new model with weights of a file, or of a checkpoint."""
    model = build_model(spec)
    if weights is None:
        return model
    if weights.is_dir():
        checkpoint = checkpoints.load(weights)
        checkpoints.load_trained(model, checkpoint, averaged=checkpoint.averages is not None)
        return model
    tensors = load_weights(weights)
    if spec.name in ("dit", "x2") and any(name.startswith("transformer_blocks.") for name in tensors):
        tensors = diffusers_to_reference(tensors, latent_size=spec.latent_size)
    missing = {name for name in model.state_dict() if name not in tensors}
    new = {name for phase in spec.schedule.phases for name in members(model, phase.groups)} if missing else set()
    load_into(model, tensors, strict=not missing <= new or not missing)
    if missing:
        log.info("weights: %d tensors of the model are new, all of them train", len(missing))
    return model


def refuse_spent(config: TrainConfig) -> None:
    """Refuse a private run on weights of another run's checkpoint: epsilon would leave out what they cost.

    It does not matter whether that run was private, nor on which data, as far as can be told: a subset, another order
    or size of the same images has another digest. `weights_are_public` says that its data was public.

    **Edge cases**: a file counts as the checkpoint's whose ``state.json`` is beside it, also through a link; a copy of
    the file alone cannot be told from published weights.

    Raises:
        UsageError: They are such.
    """
    if not config.private or config.weights is None or config.weights_are_public:
        return
    paths = (config.weights, config.weights.resolve())
    if any(((path if path.is_dir() else path.parent) / STATE).exists() for path in paths):
        fix = (
            "these are of a run's checkpoint, and a ledger charges its own run's steps alone: resume that run, or, if "
            "its data was public, say --weights-are-public"
        )
        raise UsageError.for_value("weights", str(config.weights), "public weights", fix)


def named_run(name: str) -> Path:
    """Return the folder of a run that is to go on.

    Raises:
        UsageError: It is none.
    """
    if not (Path(name) / "config.json").is_file():
        raise UsageError.for_value("resume", name, "auto, or the folder of a run")
    return Path(name)


def newest(folder: Path) -> checkpoints.Checkpoint | None:
    """Return the newest whole checkpoint of a run, or `None`."""
    path = checkpoints.latest(folder / FOLDER)
    if path is None:
        log.warning("resume: %s has no checkpoint; from the first step, what was charged stays charged", folder)
        return None
    return checkpoints.load(path)


def save(trainer: "Trainer") -> None:
    """Write a checkpoint of a trainer; every process calls it."""
    config = trainer.config
    state = trainer.world.shared(describe(trainer) if trainer.world.leads else None)
    checkpoints.save(
        trainer.folder / FOLDER,
        trainer.runner,
        state,
        keep=config.keep_checkpoints,
        trainable_only=not config.full_checkpoints,
    )


def write_or_save(trainer: "Trainer", write: Callable[[], object]) -> None:
    """Have the first process write something between two steps; every process calls it.

    If it cannot, the steps that were paid for are saved, where they can be, before all processes end.

    Raises:
        UsageError: It could not be written. The first process says so; the others end without a word.
    """
    try:
        trainer.world.first(write)
    except (UsageError, OSError, SystemExit):
        if trainer.num_taken:
            with contextlib.suppress(CheckpointError):
                save(trainer)
        raise


def restore(trainer: "Trainer", checkpoint: checkpoints.Checkpoint) -> None:
    """Put a checkpoint back into a trainer that was built at its step.

    Raises:
        UsageError: It is of another run, or the ledger does not know of what it has seen.
    """
    here = trainer.world.shared(describe(trainer) if trainer.world.leads else None)
    if trainer.config.any_world_size:
        here = replace(here, world_size=checkpoint.state.world_size)
    checkpoints.restore(checkpoint, trainer.runner, here)
    trainer.step = checkpoint.state.step
    facts = checkpoint.state.privacy
    if trainer.ledger is not None and facts.ledger_head is not None:
        trainer.ledger.require_contains(Position(num_charges=facts.num_charged_steps, chain=facts.ledger_head))
        lost = trainer.ledger.num_charges - facts.num_charged_steps
        if lost:
            log.warning("resume: %d steps after the checkpoint are lost; they stay charged", lost)


def describe(trainer: "Trainer") -> checkpoints.CheckpointState:
    """Return what a checkpoint says of its run."""
    config, budget, position = trainer.config, trainer.budget, None
    if trainer.ledger is not None:
        position = trainer.ledger.position
    return checkpoints.CheckpointState(
        step=trainer.step,
        phase=trainer.runner.phase_index,
        workload=config.workload,
        spec=trainer.spec,  # type: ignore[arg-type]  # a dataclass, kept as JSON
        base_sha256=trainer.base_sha256,
        data_sha256=trainer.data.digest,
        settings={
            "optimizer": config.chosen("optimizer"),
            "batch_size": config.batch_size,
            "max_grad_norm": config.max_grad_norm,
            "sampling": config.sampling,
        },
        privacy=checkpoints.PrivacyFacts(
            noise_multiplier=budget.noise_multiplier,
            sample_rate=budget.sample_rate,
            delta=config.delta,
            num_charged_steps=0 if position is None else position.num_charges,
            ledger_head=None if position is None else position.chain,
        ),
        world_size=trainer.world.size,
    )


def base_model(spec: WorkloadSpec, checkpoint: Path, weights: Path | None) -> nn.Module:
    """Return the model that the run of a checkpoint started from, for a checkpoint that keeps only what trained.

    Args:
        spec: The checkpoint's.
        checkpoint: Its folder; the run's ``config.json`` above it says seed and weights.
        weights: In place of those that the run's configuration says.

    Raises:
        UsageError: Weights that cannot be read or do not fit.
    """
    file, seed = checkpoint.parent.parent / "config.json", 0
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        seed = int(said["init_seed"])
        weights = weights or (said["weights"] and Path(said["weights"]))
    except (OSError, ValueError, KeyError, TypeError):
        log.info("checkpoint: no configuration of a run at %s; the model starts from seed 0", file)
    torch.manual_seed(seed)
    return _with_weights(spec, weights)
