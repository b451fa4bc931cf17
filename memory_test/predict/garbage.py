"""Garbage looked for rarely: imports and logs make millions of objects, of which next to none are garbage. No torch.

Python looks whenever 700 more objects were made, and reads ever more of those there are: a third of an import of torch,
a fifth of a prediction.
"""

import contextlib
import gc
from collections.abc import Iterator

MANY_OBJECTS = 5_000_000
"""Made between two looks."""


def collect_rarely() -> None:
    """Look rarely from now on."""
    gc.set_threshold(MANY_OBJECTS, *gc.get_threshold()[1:])


@contextlib.contextmanager
def rarely_collected() -> Iterator[None]:
    """Look rarely meanwhile."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)
