"""The result of one configuration: what every contender did in the same rounds. Plain data, no torch.

Bytes are integers, times seconds. What a contender did not reach is `None` or empty, never a made-up number.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from memory_test.core import store
from memory_test.core.schema import STRICT, Environment, Failure, Status

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of paired ratios."""

    __pydantic_config__ = STRICT

    median: float
    q1: float
    q3: float


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How contenders were timed.

    Attributes:
        rounds: Timed rounds; in round r the order of contenders is rotated by r.
        untimed_rounds: Rounds before them, whose times are not kept.
        settle_steps: Untimed steps at the start of every turn, after which memory given back is cached again.
        clock: ``processor``: seconds that a contender's one thread had a core, so that waiting for one is no part;
            ``wall``: seconds that went by.
    """

    __pydantic_config__ = STRICT

    rounds: int
    untimed_rounds: int
    settle_steps: int
    clock: Literal["wall", "processor"] = "wall"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One entrant's numbers, or why it has none.

    Attributes:
        label: Its name in the comparison; a method may enter several times.
        method: A key of `METHODS`.
        status: ``skipped``: there was no baseline to compare with.
        failure: Why the status is not ``ok``; what was measured before it is kept.
        config_resolved: Its configuration with every default made explicit.
        memory_budget_of_baseline: Its memory budget as a multiple of the baseline's peak.
        step_times_s: Time of its step in every round. Drawing the input is no part of it.
        noise_times_s: The part of each that went into adding noise.
        time_ratio: Its step over the baseline's in the same round.
        time_ratio_without_noise: The same for its step less the noise.
        noise_ratio: Its noise alone over the baseline's step.
        peak_allocated_bytes: Peak of the steady steps, from a memory pass alone on the machine.
        peak_reserved_bytes: CUDA: peak held by the caching allocator.
        breakdown_bytes: What occupied memory at the peak.
        memory_ratio: Its peak over the baseline's.
        gradient_error: Relative error of its clipped sum against the float64 loop; `None` for methods that do not clip.
        choices: What its engine chose, and what was found out by running.
    """

    __pydantic_config__ = STRICT

    label: str
    method: str
    status: Status | Literal["skipped"]
    failure: Failure | None = None
    config_resolved: dict[str, Any]
    memory_budget_of_baseline: float | None = None
    step_times_s: list[float] = field(default_factory=list)
    noise_times_s: list[float] = field(default_factory=list)
    time_ratio: Spread | None = None
    time_ratio_without_noise: Spread | None = None
    noise_ratio: Spread | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    breakdown_bytes: dict[str, int] = field(default_factory=dict)
    memory_ratio: float | None = None
    gradient_error: float | None = None
    choices: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One configuration.

    Attributes:
        comparison_id: Hash of everything asked for.
        keeps_freed_memory: Whether CPU workers held on to what they freed while they were timed.
        name: The configuration's name in its file.
        baseline: Label of the contender that ratios are taken against, which is the first.
        max_grad_norm_of_errors: C at which gradient errors were taken: the median norm, so that about half are clipped.
        oracle_failure: Why there are no gradient errors, if the float64 loop failed.
    """

    __pydantic_config__ = STRICT

    schema_version: int
    comparison_id: str
    name: str
    description: str
    created_at: str
    environment: Environment
    protocol: Protocol
    baseline: str
    contenders: list[Contender]
    max_grad_norm_of_errors: float | None = None
    oracle_failure: Failure | None = None
    keeps_freed_memory: bool = False


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Comparison)


def dump(comparison: Comparison) -> str:
    """Return a result as JSON text."""
    return json.dumps(dataclasses.asdict(comparison), indent=1, ensure_ascii=False) + "\n"


def load(path: Path) -> Comparison:
    """Read a result strictly.

    Raises:
        UsageError: Not JSON, half-written, of a newer schema, or not a comparison; names the file.
    """
    result: Comparison = store.read(path, _adapter(), "comparison", SCHEMA_VERSION)
    return result
