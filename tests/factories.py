"""Synthetic records with the shape of real ones: sizes follow a simple cost model of a DiT."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from memory_test.core import store
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import (
    BREAKDOWN,
    SCHEMA_VERSION,
    Environment,
    Failure,
    PhaseRecord,
    Record,
    Repeat,
    Status,
    Timeline,
)
from memory_test.core.units import GIB, MIB

Device = Literal["cuda", "cpu"]
METHODS = ("vanilla", "ghost", "opacus", "opacus-functorch", "opacus-ew", "opacus-ghost")


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What a method adds: parameter-sized buffers per example, kept tensors and time per step."""

    per_example: float
    kept: float
    time: float
    noise: float = 1.0


_COSTS = {
    "vanilla": _Cost(per_example=0, kept=0, time=1.0, noise=0),
    "ghost": _Cost(per_example=0, kept=0.12, time=1.62),
    "opacus": _Cost(per_example=1.0, kept=0.35, time=1.48),
    "opacus-functorch": _Cost(per_example=1.0, kept=0.5, time=2.05),
    "opacus-ew": _Cost(per_example=1.0, kept=0.2, time=1.71),
    "opacus-ghost": _Cost(per_example=0, kept=0.45, time=2.24),
}


def environment(device: Device = "cuda", **changes: Any) -> Environment:
    """Return the environment of a GPU server or of a small CPU machine."""
    common: dict[str, Any] = {
        "torch_version": "2.13.0",
        "packages": {"opacus": "1.6.0", "diffusers": "0.42.1", "numpy": "2.4.6"},
        "python_version": "3.12.4",
        "platform": "Linux-6.8-x86_64",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
    }
    if device == "cuda":
        made = Environment(
            device_type="cuda",
            device_name="NVIDIA H100 80GB HBM3",
            device_memory_bytes=85_029_158_912,
            driver_version="570.86.15",
            cuda_version="12.8",
            cudnn_version="9.7.1",
            allocator={"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            cpu_model="Intel Xeon Platinum 8480C",
            num_cpus=16,
            total_memory_bytes=128 * GIB,
            **common,
        )
    else:
        made = Environment(
            device_type="cpu",
            device_name="AMD EPYC 7B13",
            device_memory_bytes=8 * GIB,
            allocator={},
            cpu_model="AMD EPYC 7B13",
            num_cpus=2,
            total_memory_bytes=8 * GIB,
            **common,
        )
    return replace(made, **changes)


def config(experiment: str, batch_size: int, device: Device = "cuda", **changes: Any) -> ExperimentConfig:
    """Return the configuration of a cell: DiT-XL/2 on a GPU, a small DiT on pixels on a CPU."""
    small: dict[str, Any] = (
        {}
        if device == "cuda"
        else {
            "model": "DiT-S/2",
            "image_size": 32,
            "in_channels": 3,
            "hidden_size": 192,
            "depth": 6,
            "num_heads": 3,
            "num_classes": 10,
            "data": "digits",
        }
    )
    return ExperimentConfig(experiment=experiment, batch_size=batch_size, **{**small, **changes})


def breakdown(experiment: str, batch_size: int, device: Device = "cuda") -> dict[str, int]:
    """Return bytes by category; they sum to the peak."""
    parameters, activations = (2700 * MIB, 1900 * MIB) if device == "cuda" else (13 * MIB, 29 * MIB)
    cost = _COSTS[experiment]
    sizes = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer_state": 2 * parameters,
        "saved_activations": activations * batch_size,
        "per_example_gradients": cost.per_example * parameters * batch_size,
        "kept_for_clipping": cost.kept * activations * batch_size,
        "noise": cost.noise * 0.02 * parameters,
        "input": 0.004 * activations * batch_size,
        "other": 0.06 * activations * batch_size,
        "unattributed": 0.01 * parameters,
    }
    return {name: int(sizes[name]) for name in BREAKDOWN}


def step_time(experiment: str, batch_size: int, device: Device = "cuda") -> float:
    """Return the median time of a step (s)."""
    fixed, each = (0.035, 0.048) if device == "cuda" else (0.05, 0.31)
    return (fixed + each * batch_size) * _COSTS[experiment].time


def timeline(peak: int, base: int, duration: float, *, private: bool) -> Timeline:
    """Return a step's timeline: up in the forward, down in the backward, plateaus for clip and noise."""
    starts = {"forward": 0.0, "backward": 0.3, "clip": 0.72, "noise": 0.82, "optimizer": 0.88}
    if not private:
        starts = {"forward": 0.0, "backward": 0.34, "optimizer": 0.9}
    end = starts.get("clip", starts["optimizer"])
    points = 160
    times, sizes = [], []
    for index in range(points + 1):
        at = index / points
        if at < starts["backward"]:
            level = at / starts["backward"]
        elif at < end:
            level = 1 - 0.75 * (at - starts["backward"]) / (end - starts["backward"])
        else:
            level = 0.25 if at < starts["optimizer"] else 0.12
        ripple = 0.035 * (index % 4) / 3 if at < end else 0.0
        times.append(at * duration)
        sizes.append(int(base + (peak - base) * min(1.0, level * 0.965 + ripple)))
    sizes[int(starts["backward"] * points)] = peak
    return Timeline(
        time_s=times,
        allocated_bytes=sizes,
        phase_names=list(starts),
        phase_start_s=[start * duration for start in starts.values()],
    )


def _phases(peak: int, duration: float, *, private: bool) -> dict[str, PhaseRecord]:
    shares = {"forward": (0.9, 0.3), "backward": (1.0, 0.42), "optimizer": (0.55, 0.12)}
    if private:
        shares |= {"clip": (0.6, 0.1), "noise": (0.55, 0.06)}
    return {
        name: PhaseRecord(peak_allocated_bytes=int(peak * size), time_s=duration * share)
        for name, (size, share) in shares.items()
    }


def record(
    experiment: str = "ghost",
    batch_size: int = 4,
    *,
    device: Device = "cuda",
    status: Status = "ok",
    source: Literal["measured", "predicted"] = "measured",
    env: Environment | None = None,
    scale: float = 1.0,
    **config_changes: Any,
) -> Record:
    """Return one cell's record.

    Args:
        experiment: Method.
        batch_size: Examples per step.
        device: Flavour of machine and model.
        status: Anything but ``ok`` gives a record with a failure and no numbers.
        source: Measured or predicted.
        env: Environment, if not the flavour's.
        scale: Factor on every time.
        **config_changes: Fields of `ExperimentConfig`.
    """
    env = env or environment(device)
    asked = config(experiment, batch_size, device, **config_changes)
    resolved = asked.resolve(device=device, num_threads=env.num_cpus)
    common: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "source": source,
        "experiment": experiment,
        "created_at": "2026-01-15T12:00:00+00:00",
        "cell_id": f"{experiment}-b{batch_size}-{resolved['dtype']}-{source}",
        "config_requested": {"experiment": experiment, "batch_size": batch_size, **config_changes},
        "config_resolved": resolved,
        "environment": env,
        "choices": {"attention_kernel": "flash" if device == "cuda" else "math"},
    }
    ok = status == "ok"
    rest = _numbers(experiment, batch_size, device, scale, asked.num_iter) if ok else _nothing(status, device)
    return Record(**common, **rest)


def _nothing(status: Status, device: Device) -> dict[str, Any]:
    return {
        "failure": failure(status, device),
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
        "first_step_s": None,
        "step_times_s": [],
        "throughput_examples_per_s": None,
        "phases": {},
        "breakdown_bytes": {},
    }


def _numbers(experiment: str, batch_size: int, device: Device, scale: float, num_iter: int) -> dict[str, Any]:
    parts = breakdown(experiment, batch_size, device)
    peak, private = sum(parts.values()), experiment != "vanilla"
    median = step_time(experiment, batch_size, device) * scale
    wobble = (1.0, 0.97, 1.06, 0.99, 1.02)
    times = [median * wobble[index % len(wobble)] for index in range(num_iter)]
    base = parts["parameters"] + parts["optimizer_state"]
    summary: dict[str, Any] = {
        "peak_allocated_bytes": peak,
        "peak_reserved_bytes": int(peak * 1.07) if device == "cuda" else None,
        "first_step_s": median * 3.1,
        "step_times_s": times,
        "phases": _phases(peak, median, private=private),
        "breakdown_bytes": parts,
        "timeline": timeline(peak, base, median * 1.8, private=private),
    }
    one = Repeat(
        first_step_peak_allocated_bytes=peak - parts["optimizer_state"],
        process_bytes=int(peak * 1.07) + 520 * MIB if device == "cuda" else None,
        context_bytes=520 * MIB if device == "cuda" else None,
        memory_source="nvml process" if device == "cuda" else "profiler allocation events",
        peak_rss_bytes=peak + 600 * MIB,
        **summary,
    )
    return {**summary, "throughput_examples_per_s": batch_size / median, "repeats": [one]}


def failure(status: Status, device: Device = "cuda") -> Failure:
    """Return the failure that goes with a status."""
    if status == "oom":
        limit = 85_029_158_912 if device == "cuda" else 6 * GIB
        return Failure(
            phase="backward",
            message="out of memory in backward",
            requested_bytes=2 * GIB if device == "cuda" else 300 * MIB,
            free_bytes=612 * MIB if device == "cuda" else 41 * MIB,
            limit_bytes=limit,
            exit_code=1,
            stderr_tail="torch.OutOfMemoryError: tried to allocate <2.00 GiB> & failed",
        )
    messages = {
        "timeout": "no result within 3600 s",
        "error": "TypeError: einsum() got <unexpected> operands | in norm1",
        "crashed": "the worker was killed by signal 9",
    }
    return Failure(
        phase="forward",
        message=messages[status],
        exit_code=-9 if status == "crashed" else 1,
        stderr_tail="last words of the worker",
    )


def grid(device: Device = "cuda", methods: Iterable[str] = METHODS) -> list[Record]:
    """Return a sweep: every method at several batch sizes, with an out-of-memory edge and a timeout."""
    limit = (85_029_158_912 if device == "cuda" else 6 * GIB) * 0.93
    batches = (1, 2, 4, 8, 16, 32) if device == "cuda" else (1, 4)
    made = []
    for method in methods:
        for batch in batches:
            fits = sum(breakdown(method, batch, device).values()) < limit
            status: Status = "ok" if fits else "oom"
            if method == "opacus-ew" and batch == 1:
                status = "error"
            if method == "opacus-functorch" and batch == 16:
                status = "timeout"
            made.append(record(method, batch, device=device, status=status))
    return made


def write_folder(folder: Path, records: Iterable[Record]) -> Path:
    """Save records as a sweep does, one file a cell, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, item in enumerate(records):
        batch = item.config_resolved.get("batch_size", "none")
        path = folder / f"{item.experiment}-b{batch}.json"
        store.save(item, path if not path.exists() else path.with_stem(f"{path.stem}-{index}"))
    return folder
