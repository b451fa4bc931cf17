"""What a plan says. Plain data."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method on the card.

    Attributes:
        method: Key of `METHODS`.
        status: ``fits``; ``too large``: not even one example fits; ``refused``: it cannot run so.
        reason: Why it does not fit or run, and what would.
        physical_batch: Examples at a time.
        accumulation: Physical batches that make the logical one; by the loop, or by the method itself (`in_engine`).
        in_engine: Whether the method takes the logical batch and parts it itself.
        memory_budget_gib: Given to the method; `None`: it takes its own.
        peak_reserved_bytes: Predicted.
        free_bytes: Left on the card, the CUDA context counted.
        step_seconds: Of the logical batch, every operation at the card's ceilings: a ranking, not a time.
        relative_step_time: Over `vanilla`'s.
        choices: What the method chose.
    """

    method: str
    status: Literal["fits", "too large", "refused"]
    reason: str | None = None
    physical_batch: int | None = None
    accumulation: int | None = None
    in_engine: bool = False
    memory_budget_gib: float | None = None
    peak_reserved_bytes: int | None = None
    free_bytes: int | None = None
    step_seconds: float | None = None
    relative_step_time: float | None = None
    choices: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A privacy budget and the noise it asks for.

    Attributes:
        epsilon, delta: The budget.
        sample_rate, steps: Poisson sampling rate and number of steps.
        noise_multiplier: sigma.
        neighbouring: What protection means.
        accountant: Who computed it.
    """

    epsilon: float
    delta: float
    sample_rate: float
    steps: int
    noise_multiplier: float
    neighbouring: str = "add or remove one example"
    accountant: str = "dp-accounting, privacy loss distributions, Poisson sampling"

    @property
    def printed_multiplier(self) -> float:
        """The noise multiplier in four digits, never less: what people copy."""
        return math.ceil(self.noise_multiplier * 1e4) / 1e4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan.

    Attributes:
        card: As the catalogue has it.
        config: What was asked for.
        margin: Share of the card that stays free.
        methods: In the order asked for.
        recommended: The method to take; `None` if no private one fits.
        command: What measures it, to be run on the card.
        budget: The noise, if a budget was given.
        calibrated: How step times were counted: by whose calibration, or `None`: at the vendor's ceilings.
    """

    schema_version: int = SCHEMA_VERSION
    card: dict[str, Any]
    config: dict[str, Any]
    margin: float
    methods: list[MethodPlan]
    recommended: str | None
    command: str | None
    budget: Budget | None
    calibrated: str | None = None
