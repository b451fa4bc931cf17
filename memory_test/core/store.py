"""Records on disk: one JSON per cell, written atomically, read strictly."""

import json
import tempfile
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_dp.errors import UsageError
from dit_dp.files import write_whole
from memory_test.core.schema import SCHEMA_VERSION, Record

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def check_writable(path: Path, name: str = "output") -> None:
    """Raise `UsageError` unless a file can be created at `path`, whose folder must exist."""
    folder = path.parent
    if not folder.is_dir():
        raise UsageError.for_value(name, str(path), "a file in an existing folder", f"mkdir -p {folder}")
    if path.is_dir():
        raise UsageError.for_value(name, str(path), "a file name", "this is a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError.for_value(
            name, str(path), "a file in a writable folder", error.strerror or "not writable"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees all of it or what was there before.

    Raises:
        UsageError: The disk is full or the folder cannot be written to; an older file stays as it was.
    """
    try:
        write_whole(path, text.encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"output: cannot write {path}: {reason}; nothing was overwritten") from error


def dump(record: Record) -> str:
    """Return a record as JSON text."""
    data: str = json.dumps(_adapter().dump_python(record, mode="json"), indent=1, ensure_ascii=False)
    return data + "\n"


def save(record: Record, path: Path) -> None:
    """Write a record atomically."""
    write_text(path, dump(record))


def save_measured(record: Record, path: Path) -> None:
    """Write a record that took time to obtain; see `write_measured`."""
    write_measured(dump(record), path)


def write_measured(text: str, path: Path) -> None:
    """Write what took time to obtain; if that fails, keep it in the system's temporary folder.

    Raises:
        UsageError: It could not be written where it was asked for; says where it is kept, if anywhere.
    """
    try:
        write_text(path, text)
    except UsageError as error:
        try:
            rescue = Path(tempfile.mkdtemp(prefix="memory-test-rescued-")) / path.name
            write_text(rescue, text)
        except (OSError, UsageError):
            raise error from None
        raise UsageError(f"{error}; the record is kept as {rescue}") from error


def load(path: Path) -> Record:
    """Read one record.

    Raises:
        UsageError: Not JSON, half-written, of a newer schema, or not a record; names the file.
    """
    record: Record = read(path, _adapter(), "record", SCHEMA_VERSION)
    return record


def read(path: Path, adapter: "TypeAdapter[Any]", name: str, newest: int) -> Any:
    """Read a versioned JSON file strictly.

    Args:
        path: The file.
        adapter: Of the class it holds.
        name: What messages call such a file.
        newest: The latest schema version that is understood.

    Raises:
        UsageError: As for `load`.
    """
    from pydantic import ValidationError

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError.for_value(name, str(path), "a readable file", error.strerror) from error
    except ValueError as error:
        raise UsageError.for_value(
            name, str(path), "a complete JSON file", f"move it away or measure it again ({error})"
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise UsageError.for_value(name, str(path), f"a memory-test {name}", "it has no schema_version")
    if version > newest:
        raise UsageError.for_value("schema_version", version, f"<= {newest}", f"{path} needs a newer memory-test")
    try:
        return adapter.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{name}: {path} does not follow schema {version} at {where}: {first['msg']}; measure it again"
        ) from error


def load_folder(folder: Path, only: Collection[Path] | None = None) -> Iterator[tuple[Path, Record]]:
    """Yield every record below a folder, or `only` these files of it, by file name.

    Raises:
        UsageError: The folder is missing or holds no record, or a record is unreadable.
    """
    if not folder.is_dir():
        raise UsageError.for_value("folder", str(folder), "an existing folder of records")
    paths = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    paths = paths if only is None else [path for path in paths if path in only]
    if not paths:
        raise UsageError.for_value("folder", str(folder), "a folder that holds records", "run a sweep into it first")
    for path in paths:
        yield path, load(path)
