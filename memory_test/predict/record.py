"""A prediction as a record: the schema of a measured one, `source: predicted`."""

import dataclasses
import datetime
from typing import Any

from memory_test.core.config import ExperimentConfig
from memory_test.core.environment import capture
from memory_test.core.measure import Measured
from memory_test.core.schema import SCHEMA_VERSION, Environment, Failure, Record
from memory_test.predict import band
from memory_test.predict.allocator import OutOfMemoryError
from memory_test.predict.cards import Card
from memory_test.predict.settings import AllocatorSettings
from memory_test.sweep.runner import cell_id


def predicted_record(
    config: ExperimentConfig,
    resolved: dict[str, Any],
    card: Card | None,
    settings: AllocatorSettings,
    found: Measured,
    failure: OutOfMemoryError | None,
) -> Record:
    """Return the record of a prediction.

    Args:
        config: As asked for.
        resolved: With every default made explicit.
        card: Where; `None`: this machine's CPU.
        settings: Of the caching allocator.
        found: What a step takes: on the card, or, if it does not fit, wherever it would.
        failure: Why it does not fit, if so.
    """
    environment = imagined_environment(card, settings)
    repeat = found.repeat
    return Record(
        schema_version=SCHEMA_VERSION,
        status="ok" if failure is None else "oom",
        source="predicted",
        experiment=config.experiment,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cell_id=cell_id(resolved, environment),
        peak_allocated_bytes=repeat.peak_allocated_bytes,
        peak_reserved_bytes=repeat.peak_reserved_bytes,
        first_step_s=None,
        step_times_s=[],
        throughput_examples_per_s=None,
        phases=repeat.phases,
        breakdown_bytes=repeat.breakdown_bytes,
        breakdown_by_part=repeat.breakdown_by_part,
        config_requested=config.as_dict(),
        config_resolved=resolved,
        choices={**found.choices, **_of_ranks(resolved)},
        environment=environment,
        timeline=repeat.timeline,
        failure=None if failure is None else _failure(failure, card, settings),
        error_band=band.of(card, resolved, environment.torch_version),
        repeats=[repeat],
    )


def _of_ranks(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return over how many ranks, and what of them is covered; nothing for one."""
    if "sharding" not in resolved:
        return {}
    covered, not_covered = band.RANKS_COVERED[resolved["sharding"]], band.RANKS_NOT_COVERED[resolved["sharding"]]
    names = {name: resolved[name] for name in ("world_size", "sharding")}
    return {**names, "ranks_covered": covered, "ranks_not_covered": not_covered}


def imagined_environment(card: Card | None, settings: AllocatorSettings) -> Environment:
    """Return the environment of a card that is not there; versions are those of what predicts."""
    here = capture("cpu")
    if card is None:
        return here
    changed = {k: str(v) for k, v in vars(settings).items() if v != getattr(AllocatorSettings(), k)}
    return dataclasses.replace(
        here,
        device_type="cuda",
        device_name=card.name,
        device_memory_bytes=card.memory_bytes,
        allocator={
            "backend": "native, modelled",
            "settings": ", ".join(f"{k}={v}" for k, v in changed.items()) or "default",
        },
    )


def _failure(error: OutOfMemoryError, card: Card | None, settings: AllocatorSettings) -> Failure:
    limit = card.usable_bytes if card else None
    if card is not None and settings.memory_fraction is not None:
        limit = min(card.usable_bytes, int(settings.memory_fraction * card.memory_bytes))
    return Failure(
        phase=error.phase,
        message="predicted not to fit; peaks are what a step would take on a card large enough",
        requested_bytes=error.requested_bytes,
        free_bytes=None if limit is None else limit - error.allocated_bytes,
        limit_bytes=limit,
    )
