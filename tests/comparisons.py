"""Synthetic comparisons with numbers like real ones."""

from dataclasses import replace
from typing import Any

from memory_test.compare import schema
from memory_test.compare.ratios import less, paired
from memory_test.core.schema import Failure
from tests.factories import config, environment

_BASE_S, _BASE_BYTES, _NOISE_S = 1.6, 1_170_000_000, 0.08
_WOBBLE = (1.0, 1.004, 0.991, 1.013, 1.002)
COSTS = {
    "vanilla": (1.0, 1.0, None),
    "bookkeeping": (1.10, 1.01, 1.6e-7),
    "ghost": (1.64, 1.02, 1.7e-7),
    "microbatch": (1.14, 0.84, 1.1e-7),
    "opacus": (1.42, 1.47, 1.2e-7),
    "opacus-ew": (1.21, 1.57, 1.2e-7),
    "opacus-ghost": (2.12, 1.14, 6.0e-7),
}
"""Time and memory over vanilla, gradient error."""


def contender(label: str, method: str | None = None, **changes: Any) -> schema.Contender:
    """Return a contender that finished, its times a little different in every round."""
    method = method or label
    time, memory, error = COSTS[method]
    base = [_BASE_S * wobble for wobble in _WOBBLE]
    noise = [0.0 if method == "vanilla" else _NOISE_S] * len(_WOBBLE)
    times = [_BASE_S * time * wobble for wobble in (_WOBBLE if method == "vanilla" else reversed(_WOBBLE))]
    made = schema.Contender(
        label=label,
        method=method,
        status="ok",
        config_resolved=config(method, 8, "cpu").resolve(device="cpu", num_threads=1),
        step_times_s=times,
        noise_times_s=noise,
        time_ratio=paired(times, base),
        time_ratio_without_noise=paired(less(times, noise), base),
        noise_ratio=paired(noise, base),
        peak_allocated_bytes=int(_BASE_BYTES * memory),
        memory_ratio=memory,
        gradient_error=error,
        choices={"num_parameters": 1, "norm_rules": {"keep": 27, "ghost": 3}} if error else {},
    )
    return replace(made, **changes)


def lost(label: str) -> schema.Contender:
    """Return a contender that ran out of memory before it was timed."""
    return schema.Contender(
        label=label,
        method=label,
        status="oom",
        failure=Failure(phase="memory: backward", message="out of memory"),
        config_resolved=config(label, 8, "cpu").resolve(device="cpu", num_threads=1),
    )


def comparison(contenders: list[schema.Contender] | None = None, **changes: Any) -> schema.Comparison:
    """Return a result of all methods in `COSTS`."""
    made = schema.Comparison(
        schema_version=schema.SCHEMA_VERSION,
        comparison_id="0123456789abcdef",
        name="n8",
        description="Made up.",
        created_at="2026-01-15T12:00:00+00:00",
        environment=environment("cpu"),
        protocol=schema.Protocol(rounds=5, untimed_rounds=2, settle_steps=0),
        baseline="vanilla",
        contenders=[contender(method) for method in COSTS] if contenders is None else contenders,
        max_grad_norm_of_errors=0.8125,
    )
    return replace(made, **changes)
