"""The record: what one cell leaves behind, measured or not. Plain data, no torch.

Bytes are integers. A key that a status cannot fill is `None`, never a made-up number.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 3

Status = Literal["ok", "oom", "error", "timeout", "crashed"]
PHASES = ("model", "forward", "backward", "clip", "noise", "optimizer")
"""In the order in which a step goes through them; `model` covers construction, before the first step."""

BREAKDOWN = (
    "parameters",
    "gradients",
    "optimizer_state",
    "saved_activations",
    "per_example_gradients",
    "kept_for_clipping",
    "noise",
    "input",
    "other",
    "unattributed",
)
"""Categories of `breakdown_bytes`, in the order in which they are stacked.

saved_activations: born in the forward, alive after it, gone when its step ends. per_example_gradients: as the
engine says. kept_for_clipping: norm and Gram buffers, and what else an engine says it holds for clipping alone; a
layer's input that autograd saves anyway is a saved activation. other: born in an operator and in no category above:
temporaries, library workspaces, activations that checkpointing recomputes. unattributed: the remainder of the
measured peak.
"""

STRICT = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """Peak memory within a phase of a steady step (bytes) and its median time (s).

    Attributes:
        peak_allocated_bytes: Of the allocator.
        peak_reserved_bytes: CUDA: held by the caching allocator.
        process_bytes: CUDA: held by the process at the phase's end, by NVML.
        device_used_bytes: CUDA: held by all processes at the phase's end, by NVML.
        rss_bytes: Resident set at the phase's end, in the last untimed step of the timing pass.
        time_s: Median over the timed steps.
    """

    __pydantic_config__ = STRICT

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    device_used_bytes: int | None = None
    rss_bytes: int | None = None
    time_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell has no numbers.

    Attributes:
        phase: The phase the worker was in, if it said.
        message: One line.
        requested_bytes: Out of memory: the size of the allocation that failed, if known.
        free_bytes: Out of memory: what was free when it failed, if known.
        limit_bytes: The memory the worker was allowed, or the card has.
        exit_code: The worker's exit code; negative: the signal that killed it.
        stderr_tail: The last lines the worker wrote.
    """

    __pydantic_config__ = STRICT

    phase: str | None
    message: str
    requested_bytes: int | None = None
    free_bytes: int | None = None
    limit_bytes: int | None = None
    exit_code: int | None = None
    stderr_tail: str = ""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a number was measured. Two records are comparable if `identity` agrees."""

    __pydantic_config__ = STRICT

    device_type: Literal["cuda", "cpu"]
    device_name: str
    device_memory_bytes: int
    driver_version: str | None = None
    cuda_version: str | None = None
    cudnn_version: str | None = None
    allocator: dict[str, str]
    torch_version: str
    packages: dict[str, str]
    python_version: str
    platform: str
    cpu_model: str
    num_cpus: int
    total_memory_bytes: int
    commit: str | None = None
    dirty: bool | None = None
    changes: str | None = None
    """Digest of the uncommitted changes to tracked files, if there are any."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that change a measurement, for hashing and comparing."""
        sizes = ("device_memory_bytes", "total_memory_bytes")  # differ by a few pages from boot to boot
        kept = {name: value for name, value in vars(self).items() if name != "dirty"}
        return {name: round(value / 2**30) if name in sizes else value for name, value in kept.items()}


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Allocated memory through one steady step: when (s from the step's start) and how much (bytes).

    Attributes:
        time_s: Sample times, increasing.
        allocated_bytes: Allocated memory at each of them; every local peak is kept.
        phase_names: Phases in the order in which they began.
        phase_start_s: When each began.
    """

    __pydantic_config__ = STRICT

    time_s: list[float]
    allocated_bytes: list[int]
    phase_names: list[str]
    phase_start_s: list[float]


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One process: a timing pass and a memory pass of the same loop.

    Attributes:
        first_step_peak_allocated_bytes: Peak within step 1, before optimizer state exists at its start.
        peak_allocated_bytes: Peak of the steady steps after it.
        peak_reserved_bytes: CUDA: peak held by the caching allocator.
        process_bytes: CUDA: what the process holds on the device by NVML, context included.
        device_used_bytes: CUDA: what all processes hold on the device by NVML.
        context_bytes: CUDA: process_bytes less what the allocator reserves.
        memory_source: How memory was read; says so where NVML gave device-wide use only.
        peak_rss_bytes: Peak resident set of the process.
        first_step_s: Time of step 1.
        step_times_s: Time of each timed step.
        breakdown_by_part: Bytes at the peak by part of the model (its groups of parameters) and category.
    """

    __pydantic_config__ = STRICT

    first_step_peak_allocated_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    device_used_bytes: int | None = None
    context_bytes: int | None = None
    memory_source: str
    peak_rss_bytes: int | None = None
    first_step_s: float | None
    step_times_s: list[float]
    phases: dict[str, PhaseRecord]
    breakdown_bytes: dict[str, int]
    breakdown_by_part: dict[str, dict[str, int]] = field(default_factory=dict)
    timeline: Timeline | None = None


@dataclass(frozen=True, kw_only=True)
class ErrorBand:
    """Largest relative errors of a prediction that were seen, and against what.

    Attributes:
        peak_allocated, peak_reserved: Of the peaks; `None`: there is no such number.
        source: What it was compared with.
    """

    __pydantic_config__ = STRICT

    peak_allocated: float
    peak_reserved: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell. The top level summarises `repeats`: the largest peak, all step times, medians of times."""

    __pydantic_config__ = STRICT

    schema_version: int
    status: Status
    source: Literal["measured", "predicted"]
    experiment: str
    created_at: str
    cell_id: str
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    first_step_s: float | None
    step_times_s: list[float]
    throughput_examples_per_s: float | None
    phases: dict[str, PhaseRecord]
    breakdown_bytes: dict[str, int]
    breakdown_by_part: dict[str, dict[str, int]] = field(default_factory=dict)
    config_requested: dict[str, Any]
    config_resolved: dict[str, Any]
    choices: dict[str, Any] = field(default_factory=dict)
    """What was chosen automatically or found out by running: attention kernel, norm rules, parameters."""
    environment: Environment | None
    timeline: Timeline | None = None
    failure: Failure | None = None
    error_band: ErrorBand | None = None
    """Of a predicted record."""
    repeats: list[Repeat] = field(default_factory=list)
