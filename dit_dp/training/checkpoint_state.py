"""What a checkpoint says of its run, as plain data, and the text that it is kept as. No torch.

No state of a random generator is among it, and none may be added: restored, the source of noise would give the same
noise to sums that may differ, and the difference of two releases would be free of noise.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_dp import validate
from dit_dp.errors import CheckpointError, UsageError

FORMAT = "dit-dp checkpoint"
FORMAT_VERSION = 1
STATE = "state.json"
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
TENSOR_FILES = (MODEL, EMA, OPTIMIZER)
MAX_BYTES = 16 * 1024**2
"""Of `state.json`: more is not read."""

_LARGEST = 2**53
"""Of counts: larger numbers are not the same in every JSON reader."""

_STRICT = {"extra": "forbid", "strict": True}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ABSENT: Any = object()
_MOST = 12
"""Differences that a message lists."""


@dataclass(frozen=True, kw_only=True)
class PrivacyFacts:
    """What the accountant must know to go on.

    Attributes:
        noise_multiplier: sigma; 0: no privacy.
        sample_rate: q, expected share of the units in a step.
        delta: Of the guarantee; `None`: none is stated.
        num_charged_steps: Steps that the ledger has charged: at least as many as were made.
        ledger_head: Hash of the ledger's last entry; `None`: there is no ledger.

    Raises:
        UsageError: A value is out of range.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    noise_multiplier: float
    sample_rate: float
    delta: float | None = None
    num_charged_steps: int = 0
    ledger_head: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        validate.real("noise_multiplier", self.noise_multiplier, positive=False)
        for name in ("sample_rate", "delta"):
            value = getattr(self, name)
            if value is None and name == "delta":
                continue
            validate.real(name, value, positive=True)
            if value > 1:
                raise UsageError.for_value(name, value, "a number > 0 and <= 1")
        _count("num_charged_steps", self.num_charged_steps)
        if self.ledger_head is not None:
            _sha256("ledger_head", self.ledger_head)


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Where a run stands, and what must be the same when it goes on.

    Attributes:
        step: Last finished step; 0: none.
        phase: Number of that step's phase, from 0.
        workload: Key of `WORKLOADS`.
        spec: The workload's specification: a dataclass such as `WorkloadSpec`, kept as JSON.
        base_sha256: `base_digest` of what no phase trains.
        data_sha256: `Images.digest` of the data, or the digest of the partition into sets.
        settings: Further settings that must agree, by name; JSON values.
        privacy: What the accountant must know.
        world_size: Number of ranks; `None`: it may change. Tensors are stored whole, and sums and noise are those of
            one rank, so that under Poisson sampling it may; not where fixed batches are dealt out to ranks.
        trainable_only: Whether the weights are only those that some phase trains.

    Raises:
        UsageError: A value is out of range, or is not JSON.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    step: int
    phase: int
    workload: str
    spec: Mapping[str, Any]
    base_sha256: str
    data_sha256: str
    settings: Mapping[str, Any]
    privacy: PrivacyFacts
    world_size: int | None = None
    trainable_only: bool = False

    def __post_init__(self) -> None:
        """Check every field; bring what is nested to what JSON makes of it."""
        for name in ("step", "phase"):
            _count(name, getattr(self, name))
        for name in ("base_sha256", "data_sha256"):
            _sha256(name, getattr(self, name))
        for name in ("spec", "settings"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if self.world_size is not None:
            _count("world_size", self.world_size, minimum=1)
        if self.privacy.ledger_head is not None and self.privacy.num_charged_steps < self.step:
            accepted = f"at least {self.step}, the steps that were made"
            raise UsageError.for_value("num_charged_steps", self.privacy.num_charged_steps, accepted)

    def require_same_run(self, here: "CheckpointState") -> None:
        """Refuse to go on under other conditions than those this checkpoint was made under.

        Compared are the workload, its specification, the base weights, the data, the settings, noise multiplier,
        sample rate, delta and world size; not the step, what was charged, nor whether all weights are kept.

        Raises:
            UsageError: Lists what differs.
        """
        ours, theirs = _compared(here), _compared(self)
        names = [name for name in {**ours, **theirs} if ours.get(name, _ABSENT) != theirs.get(name, _ABSENT)]
        if self.world_size is None and "world_size" in names:
            names.remove("world_size")
        if names:
            found = [f"{name}: {_shown(ours, name)} here, {_shown(theirs, name)} in the checkpoint" for name in names]
            found[_MOST:] = [f"and {len(names) - _MOST} more"] if len(names) > _MOST else []
            fix = "set these back, or begin anew in another folder"
            if names == ["world_size"] and self.settings.get("sampling") == "poisson":
                fix += ", or say any_world_size"
            raise UsageError(f"resume: {'; '.join(found)}; {fix}")


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A file of a checkpoint.

    Attributes:
        num_bytes: Its size.
        sha256: Of its content.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Check both."""
        _count("num_bytes", self.num_bytes)
        _sha256("sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that `state.json` holds.

    Attributes:
        state: Of the run.
        files: The other files, by name.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    state: CheckpointState
    files: dict[str, FileFacts]

    def __post_init__(self) -> None:
        """Check that the files are a checkpoint's; no other name is ever joined to a path."""
        if not {MODEL, OPTIMIZER} <= self.files.keys() <= set(TENSOR_FILES):
            raise UsageError.for_value("files", sorted(self.files), f"{MODEL}, {OPTIMIZER} and at most {EMA}")

    def dump(self) -> str:
        """Return the text, sealed by a hash of itself."""
        body = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return _text({**body, "sha256": seal(body)})

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Manifest":
        """Read such a text, which must be what `dump` wrote, to the letter.

        Args:
            content: Of the file.
            where: Its name, for messages.

        Raises:
            CheckpointError: It is damaged, of a newer version, or something else.
        """
        body = _read(content, where)
        version = body.get("version")
        if body.get("format") != FORMAT or type(version) is not int or not 0 < version < 2**31:
            raise CheckpointError(f"checkpoint: {where} is not the state of a dit-dp checkpoint")
        if version > FORMAT_VERSION:
            newer = f"version {version}; accepted: up to {FORMAT_VERSION}; install a newer dit-dp"
            raise CheckpointError(f"checkpoint: {where} is of {newer}")
        sealed = body.pop("sha256", None)
        if sealed != seal(body) or _text({**body, "sha256": sealed}).encode() != content:
            raise CheckpointError(f"checkpoint: {where} was changed since it was written; take another")
        del body["format"], body["version"]
        return _validated(cls, body, where)


def seal(body: Mapping[str, Any]) -> str:
    """Return the hash of what `state.json` says."""
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _read(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a text that may be anything."""
    try:
        body = json.loads(content)
        _text(body)
    except (ValueError, RecursionError) as error:  # a ValueError too: not UTF-8, too many digits, not finite
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"checkpoint: {where} is no complete JSON file ({reason})") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"checkpoint: {where} holds a {type(body).__name__}; accepted: a JSON object")
    return body


def _validated(cls: type[Manifest], body: dict[str, Any], where: str) -> Manifest:
    """Return the manifest, strictly read."""
    from pydantic import TypeAdapter, ValidationError

    try:
        manifest: Manifest = TypeAdapter(cls).validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:60] for part in first["loc"])
        reason = " ".join(f"{place} {first['msg']}".split())[:300]
        raise CheckpointError(f"checkpoint: {where} does not follow version {FORMAT_VERSION}: {reason}") from error
    for kind, given in ((CheckpointState, body["state"]), (PrivacyFacts, body["state"]["privacy"])):
        absent = [field.name for field in dataclasses.fields(kind) if field.name not in given]
        if absent:  # what has a default in code has none in a file
            reason = f"state has no {absent[0]}"
            raise CheckpointError(f"checkpoint: {where} does not follow version {FORMAT_VERSION}: {reason}")
    return manifest


def _text(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _plain(name: str, value: object) -> Any:
    """Return a dataclass or mapping as JSON gives it back: with lists for tuples."""

    def nested(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Mapping):
            return dict(item)
        raise UsageError.for_value(name, item, "numbers, text, lists and mappings", "what is kept as JSON")

    try:
        plain = json.loads(json.dumps(value, default=nested, allow_nan=False))
    except UsageError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError.for_value(name, type(value).__name__, "what can be kept as JSON", str(error)) from error
    if not isinstance(plain, dict):
        raise UsageError.for_value(name, type(value).__name__, "a mapping or a dataclass")
    _check_depth(name, plain)
    return plain


def _check_depth(name: str, value: object, levels: int = 16) -> None:
    """Refuse what is nested so deep that whoever reads it might run out of stack."""
    if not levels:
        raise UsageError.for_value(name, "deeply nested values", "at most 16 levels")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(name, item, levels - 1)


def _compared(state: CheckpointState) -> dict[str, Any]:
    """Return what must agree, by name."""
    privacy = state.privacy
    return {
        "workload": state.workload,
        **_flat("spec", state.spec),
        **_flat("settings", state.settings),
        "base weights": state.base_sha256,
        "dataset": state.data_sha256,
        **{name: getattr(privacy, name) for name in ("noise_multiplier", "sample_rate", "delta")},
        "world_size": state.world_size,
    }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name."""
    if isinstance(value, Mapping) and value:
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(f"{prefix}.{key}", inner).items()}
    return {prefix: value}


def _shown(values: Mapping[str, Any], name: str) -> str:
    """Return a value for a message; of a hash the beginning."""
    value = values.get(name, _ABSENT)
    if value is _ABSENT:
        return "nothing"
    text = f"sha256 {value[:12]}" if isinstance(value, str) and _SHA256.fullmatch(value) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _count(name: str, value: object, minimum: int = 0) -> None:
    validate.integer(name, value, minimum=minimum)
    if isinstance(value, int) and value > _LARGEST:
        raise UsageError.for_value(name, f"a number of {value.bit_length()} bits", f"at most {_LARGEST}")


def _sha256(name: str, value: object) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise UsageError.for_value(name, str(value)[:80], "a sha256 in 64 hexadecimal digits")
