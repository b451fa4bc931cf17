"""Files that are there whole or not at all. No torch."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yield what to write a file's content into, which takes the file's place when all of it is there.

    Whenever the process ends, or if writing fails, a reader sees what was there before. `OSError` passes.

    Args:
        path: The file; its folder exists.
        sync: Whether the content is on the disk before it takes the place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            if sync:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file by `replacing`."""
    with replacing(path, sync=sync) as handle:
        handle.write(content)
