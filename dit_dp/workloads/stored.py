"""A workload's specification as it is read back from JSON. No torch."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.objectives.config import ObjectiveConfig
from dit_dp.workloads.config import WorkloadSpec
from dit_dp.workloads.registry import WORKLOADS


def stored_spec(plain: Mapping[str, Any]) -> WorkloadSpec:
    """Return the specification that ``dataclasses.asdict`` turned into `plain`, by way of JSON.

    Args:
        plain: Of a checkpoint's ``spec``: numbers, text, lists and mappings.

    Raises:
        UsageError: A field missing, unknown or of another type, or a value that is not accepted.
    """
    from pydantic import TypeAdapter, ValidationError

    _check_fields("spec", plain, WorkloadSpec)
    _check_fields("spec.objective", plain["objective"], ObjectiveConfig)
    try:
        spec = TypeAdapter(WorkloadSpec).validate_json(json.dumps(dict(plain)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"spec: {place}: {' '.join(str(first['msg']).split())}") from error
    validate.one_of("spec.name", spec.name, WORKLOADS)
    return dataclasses.replace(spec, arguments={name: _tuples(value) for name, value in spec.arguments.items()})


def _check_fields(name: str, plain: object, cls: type) -> None:
    """Raise `UsageError` unless a mapping has exactly a dataclass's fields."""
    wanted = {field.name for field in dataclasses.fields(cls)}
    got = set(plain) if isinstance(plain, Mapping) else set()
    if got != wanted:
        differing = ", ".join(sorted(map(str, got ^ wanted)))
        raise UsageError(
            f"{name}: these fields are missing or unknown: {differing}; it is of another version of dit-dp"
        )


def _tuples(value: Any) -> Any:
    """Return lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
