"""Ctrl-C and SIGTERM at the end of a step, so that what was paid for can be kept. No torch."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)
"""A user's Ctrl-C, and how schedulers and torchrun end a process."""


@contextlib.contextmanager
def waiting(*, alone: bool) -> Iterator[Callable[[], int]]:
    """Have the first signal of `STOPS` wait until it is asked for.

    Args:
        alone: Whether this is the only process; then the second signal stops it as ever. Of several each may get one
            from the terminal and one from torchrun, which kills those that take longer than 30 seconds.

    Yields:
        The signal that came; 0: none.
    """
    came = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: came
        return

    def take_note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        if alone:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, take_note) for number in STOPS}
    try:
        yield lambda: came
    finally:
        restore()
