"""Records as tables: one row per record, then one row per method and batch size within a group.

A group is what may be compared: records of one environment, device and dtype whose configurations differ in
the method, the batch size and in settings that cost nothing (`FREE`). Averages are taken over records of one
configuration only; everything else is refused, naming what differs.
"""

import dataclasses
import hashlib
import json
import re
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from memory_test.core import store
from memory_test.core.config import DECIDED, DERIVED, ExperimentConfig
from memory_test.core.schema import BREAKDOWN, PHASES, Environment, PhaseRecord, Record

FREE = (
    "experiment",
    "batch_size",
    "num_iter",
    "warmup",
    "repeats",
    "seed",
    "learning_rate",
    "max_grad_norm",
    "noise_multiplier",
    "timeout_s",
    "memory_limit_gib",
    "memory_budget_gib",
)
"""Fields that may differ within a group: the method, the batch size, the protocol, values without a cost."""

LIMITS = ("timeout_s", "memory_limit_gib")
"""Fields that may differ within an average: a limit that was not reached changes no number."""

BASELINE = "vanilla"
SIZES = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "first_step_peak_allocated_bytes",
    "process_bytes",
    "peak_rss_bytes",
)
TIMES = ("step_time_s", "step_time_q1_s", "step_time_q3_s", "step_time_min_s", "step_time_max_s")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A section of a report: rows that may be compared with each other.

    Attributes:
        title: What the rows share, for people.
        slug: The same for file names.
        rows: One row per method, source and batch size, as `summarise` returns them.
        config: Configuration fields all records share, by name.
        protocol: Fields of `FREE` other than method and batch size: name and the values met.
    """

    title: str
    slug: str
    rows: pd.DataFrame
    config: dict[str, Any]
    protocol: dict[str, list[Any]]


def load_frame(folder: Path, only: Collection[Path] | None = None) -> pd.DataFrame:
    """Read a folder of records into a table with one row per record.

    Columns: ``experiment``, ``status``, ``source``, the configuration's main fields, peaks (bytes), times
    (seconds), ``throughput_examples_per_s``, ``phase_NAME_peak_allocated_bytes``, ``phase_NAME_time_s``,
    ``breakdown_CATEGORY_bytes``, ``device_name``, ``cell_id``, ``path`` (below `folder`), ``group`` (rows
    that share it may be compared) and ``record``, the `Record` itself. What a record lacks is empty.

    Args:
        folder: Folder of one machine's records, searched recursively.
        only: These files below it, if not all: a sweep's own, where older ones lie beside them.

    Raises:
        UsageError: No records, an unreadable one, or records of two devices or environments.
    """
    loaded = [(path.relative_to(folder).as_posix(), record) for path, record in store.load_folder(folder, only)]
    check_environment(record for _, record in loaded)
    device = next((r.environment.device_name for _, r in loaded if _is_measured(r) and r.environment), None)
    frame = pd.DataFrame([_row(path, record, device) for path, record in loaded])
    sizes = [name for name in frame.columns if name.endswith("_bytes")]
    frame[sizes] = frame[sizes].astype("Int64")
    times = [name for name in frame.columns if name.endswith(("_s", "_per_s"))]
    frame[times] = frame[times].astype("float64")
    order = {name: index for index, name in enumerate(METHODS)}
    rank = frame["experiment"].map(lambda name: order.get(name, len(order)))
    frame = frame.assign(_rank=rank)
    frame = frame.sort_values(["group", "_rank", "experiment", "source", "batch_size", "path"])
    return frame.drop(columns="_rank").reset_index(drop=True)


def check_environment(records: Iterable[Record]) -> None:
    """Raise `UsageError` unless all measured, and all predicted, records come from one environment."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.environment is not None:
            by_source.setdefault(record.source, []).append(_flat(record.environment.identity()))
    for flats in by_source.values():
        _refuse_differences(
            flats,
            "records of one device and environment",
            "report each alone: one folder per machine and commit",
        )


def average(records: list[Record]) -> dict[str, Any]:
    """Put records of one configuration together: the largest peak, the median over all their steps.

    Args:
        records: At least one record.

    Returns:
        Sizes (bytes), step times (s) and throughput, as columns of `load_frame`.

    Raises:
        UsageError: The records differ in environment, device, dtype, schema or any other field that counts.
    """
    flats = []
    for record in records:
        identity = record.environment.identity() if record.environment else {}
        config = {name: value for name, value in record.config_resolved.items() if name not in LIMITS}
        head = {"schema_version": record.schema_version, "source": record.source}
        flats.append({**head, **_flat(identity), **_flat(config)})
    _refuse_differences(flats, "one value within an average", "report each from a folder of its own")
    times = [time for record in records for time in record.step_times_s]
    rates = [r.throughput_examples_per_s for r in records if r.throughput_examples_per_s is not None]
    peaks = {name: _largest(_sizes(record)[name] for record in records) for name in SIZES}
    return {
        **peaks,
        **_spread(times),
        "first_step_s": _median([r.first_step_s for r in records if r.first_step_s is not None]),
        "throughput_examples_per_s": _median(rates),
    }


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per group, method, source and batch size, with overheads over vanilla.

    A cell measured again after a failure counts with its numbers. Added columns: ``label`` (the method,
    marked if predicted), ``memory_ratio`` and ``time_ratio`` (over vanilla of the same group, source and
    batch size; empty without one), ``numbers`` (positions in `frame`, from 1) and ``num_records``.

    Args:
        frame: What `load_frame` returned.
    """
    rows = []
    for _, cell in frame.groupby(["group", "experiment", "source", "batch_size"], sort=False, dropna=False):
        good = cell[cell["status"] == "ok"]
        used = good if len(good) else cell.iloc[-1:]
        row = used.iloc[0].to_dict()
        row.update(average(list(used["record"])))
        row["numbers"] = [int(index) + 1 for index in used.index]
        row["num_records"] = len(used)
        mark = " (predicted)" if row["source"] == "predicted" else ""
        row["label"] = row["experiment"] + mark
        rows.append(row)
    made = pd.DataFrame(rows)
    sizes = [name for name in made.columns if name.endswith("_bytes")]
    made[sizes] = made[sizes].astype("Int64")
    return _with_overheads(made)


def _with_overheads(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["group", "source", "batch_size"]
    base = rows[(rows["experiment"] == BASELINE) & (rows["status"] == "ok")]
    base = base[[*keys, "peak_allocated_bytes", "step_time_s"]]
    merged = rows.merge(base, on=keys, how="left", suffixes=("", "_base"))
    peak, time = merged.pop("peak_allocated_bytes_base"), merged.pop("step_time_s_base")
    merged["memory_ratio"] = (merged["peak_allocated_bytes"] / peak).astype("Float64").astype("float64")
    merged["time_ratio"] = (merged["step_time_s"] / time).astype("float64")
    return merged


def groups(frame: pd.DataFrame) -> list[Group]:
    """Split a table into its comparison groups, largest first.

    Args:
        frame: What `load_frame` returned.
    """
    summary = summarise(frame)
    configs = {str(key): _group_config(part) for key, part in frame.groupby("group", sort=False)}
    made: list[Group] = []
    for key, config in configs.items():
        title = _title(config, _varying(config, configs.values()))
        title = f"{title} · {key}" if title in {group.title for group in made} else title
        rows = summary[summary["group"] == key].reset_index(drop=True)
        part = frame[frame["group"] == key]
        short = title.replace(" px", "px").replace(" channels", "ch").replace(" tokens", "t")
        slug = re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")
        made.append(Group(title=title, slug=slug, rows=rows, config=config, protocol=_protocol(part)))
    return sorted(made, key=lambda group: (-len(group.rows), group.title))


def headline_batch(rows: pd.DataFrame) -> int | None:
    """Return the batch size most methods finished, the larger on a tie; with vanilla if it ran at all."""
    good = rows[rows["status"] == "ok"]
    with_base = good[good["experiment"] == BASELINE]["batch_size"]
    if len(with_base):
        good = good[good["batch_size"].isin(with_base)]
    if not len(good):
        return None
    counts = good.groupby("batch_size").size()
    return max((int(count), int(str(batch))) for batch, count in counts.items())[1]


def measured_if_any(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the measured rows, or all where none was measured."""
    measured = rows["source"] == "measured"
    return rows[measured] if measured.any() else rows


def environment_of(frame: pd.DataFrame) -> Environment | None:
    """Return the environment of the measured records, else of the predicted ones, if any says."""
    found = [record.environment for record in measured_if_any(frame)["record"]]
    return next((environment for environment in found if environment is not None), None)


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that did not finish, with ``reason``, ``phase`` and ``stderr_tail`` columns."""
    bad = frame[frame["status"] != "ok"].copy()
    found = [record.failure for record in bad["record"]]
    bad["phase"] = [item.phase if item else None for item in found]
    bad["reason"] = [item.message if item else "the record gives no reason" for item in found]
    bad["stderr_tail"] = [item.stderr_tail if item else "" for item in found]
    for name in ("requested_bytes", "free_bytes"):
        bad[name] = pd.array([getattr(item, name, None) for item in found], dtype="Int64")
    return bad


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ExperimentConfig) if f.name != "experiment"}


def config_of(record: Record) -> dict[str, Any]:
    """Return the resolved configuration, over what was asked for, over the defaults."""
    return {**_DEFAULTS, **record.config_requested, **record.config_resolved}


def _is_measured(record: Record) -> bool:
    return record.source == "measured"


def _row(path: str, record: Record, device: str | None) -> dict[str, Any]:
    config = config_of(record)
    fields = ("model", "dtype", "image_size", "num_tokens", "in_channels", "batch_size", "optimizer")
    environment = record.environment
    row: dict[str, Any] = {
        "experiment": record.experiment,
        "status": record.status,
        "source": record.source,
        **{name: config.get(name) for name in fields},
        "activation_checkpointing": config.get("activation_checkpointing", False),
        **_sizes(record),
        "first_step_s": record.first_step_s,
        **_spread(record.step_times_s),
        "throughput_examples_per_s": record.throughput_examples_per_s,
    }
    for name in PHASES:
        phase = record.phases.get(name, PhaseRecord())
        row[f"phase_{name}_peak_allocated_bytes"] = phase.peak_allocated_bytes
        row[f"phase_{name}_time_s"] = phase.time_s
    for name in BREAKDOWN:
        row[f"breakdown_{name}_bytes"] = record.breakdown_bytes.get(name)
    row["device_name"] = environment.device_name if environment else None
    row["device_memory_bytes"] = environment.device_memory_bytes if environment else None
    row.update(cell_id=record.cell_id, path=path, group=_group_key(record, device), record=record)
    return row


def _group_key(record: Record, device: str | None) -> str:
    """Return a hash of everything that comparable records share.

    A worker that died may leave no environment; its folder holds one machine's records, so it belongs there.
    """
    config = _shared(record)
    config["schema_version"] = record.schema_version
    config["device_name"] = record.environment.device_name if record.environment else device
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sizes(record: Record) -> dict[str, int | None]:
    nested = ("first_step_peak_allocated_bytes", "process_bytes", "peak_rss_bytes")
    return {
        "peak_allocated_bytes": record.peak_allocated_bytes,
        "peak_reserved_bytes": record.peak_reserved_bytes,
        **{name: _largest(getattr(repeat, name) for repeat in record.repeats) for name in nested},
    }


def _spread(times: list[float]) -> dict[str, float | None]:
    """Return median, quartiles and extremes of step times (s)."""
    if not times:
        return dict.fromkeys(TIMES)
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    values = (statistics.median(times), quartiles[0], quartiles[2], min(times), max(times))
    return dict(zip(TIMES, values, strict=True))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Hashable]:
    """Return nested mappings as one level with dotted names and hashable values."""
    made: dict[str, Hashable] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            made.update(_flat(value, f"{prefix}{name}."))
        else:
            made[prefix + name] = value if isinstance(value, Hashable) else json.dumps(value)
    return made


def _refuse_differences(flats: list[dict[str, Hashable]], accepted: str, fix: str) -> None:
    """Raise a one-line `UsageError` that names the first field whose values differ, and the others."""
    names = dict.fromkeys(name for flat in flats for name in flat)
    differing = [name for name in names if len({flat.get(name) for flat in flats}) > 1]
    if not differing:
        return
    first = min(differing, key=lambda name: (name != "device_name", name != "device_type"))
    counts: dict[Hashable, int] = {}
    for flat in flats:
        counts[flat.get(first)] = counts.get(flat.get(first), 0) + 1
    got = ", ".join(f"{value!r} ({count} records)" for value, count in counts.items())
    others = [name for name in differing if name != first]
    also = f" (also differ: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''})" if others else ""
    raise UsageError(f"{first}: got {got}{also}; accepted: {accepted}; {fix}")


def _shared(record: Record) -> dict[str, Any]:
    return {name: value for name, value in config_of(record).items() if name not in FREE}


def _group_config(part: pd.DataFrame) -> dict[str, Any]:
    named = part["device_name"].dropna()
    return {"device_name": named.iloc[0] if len(named) else None, **_flat(_shared(part["record"].iloc[0]))}


def _protocol(part: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the values met of each field that may differ, but for method and batch size."""
    found: dict[str, list[Any]] = {}
    for name in FREE[2:]:
        values = {config_of(record).get(name) for record in part["record"]}
        found[name] = sorted((value for value in values if value is not None), key=float)
    return found


def _varying(own: Mapping[str, Any], configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the fields that tell a group from others; what a workload decides, from those of its workload."""
    known = list(configs)
    alike = [config for config in known if config.get("workload") == own.get("workload")]
    names = dict.fromkeys(name for config in known for name in config)
    found = {
        name: {json.dumps(config.get(name), default=str) for config in (alike if _of_workload(name) else known)}
        for name in names
    }
    for name in DECIDED:  # by a model of the user's own, of which nothing is known
        found.get(name, set()).discard("null")
    return [name for name, values in found.items() if len(values) > 1]


def _of_workload(name: str) -> bool:
    """Return whether a field is one that a workload decides, or says no more than such fields."""
    return name.partition(".")[0] in (*DECIDED, *DERIVED, "model", "pretrained")


def _hidden(name: str, hidden: Collection[str], config: Mapping[str, Any]) -> bool:
    """Return whether a title leaves a field out: it is said, or implied, or an argument that repeats a field."""
    group, _, own = name.rpartition(".")
    repeated = bool(group) and (own in config or own in ("input_size", "img_size", "model_name", "context_shape"))
    return name in hidden or repeated


def _title(config: Mapping[str, Any], varying: list[str]) -> str:
    said = (
        "model",
        "workload",
        "image_size",
        "in_channels",
        "num_tokens",
        "dtype",
        "activation_checkpointing",
        "train",
    )
    also = ("trained_groups", "unit", "pretrained")
    implied = ("latent_size", "hidden_size", "depth", "num_heads", "patch_size", "latent_downsample")
    size, channels, tokens = (config.get(name) for name in ("image_size", "in_channels", "num_tokens"))
    parts = [
        str(config.get("model")),
        *([] if tokens is None else [f"{size} px, {channels} channels, {tokens} tokens"]),
        str(config.get("dtype")),
    ]
    if config.get("activation_checkpointing"):
        parts.append("activation checkpointing")
    if config.get("train") not in (None, "full") or "train" in varying:
        parts.append(f"train {config['train']}")
    told = {*said, *also, *(implied if {"model", "image_size", "num_tokens"} & set(varying) else ())}
    hidden = {*told, *(name for name in DECIDED if config.get(name) is None)}
    parts += [f"{name.rpartition('.')[2]} {config.get(name)}" for name in varying if not _hidden(name, hidden, config)]
    return " · ".join(parts)
