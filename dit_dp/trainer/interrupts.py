"""Ctrl-C and SIGTERM at the end of a step, so that what was paid for can be kept. No torch."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)
"""A user's Ctrl-C, and how schedulers and torchrun end a process."""

INSISTS_S = 5.0
"""Seconds after the first signal from which on another one, to one of several processes, is meant."""


@contextlib.contextmanager
def waiting(*, alone: bool) -> Iterator[Callable[[], int]]:
    """Have the first signal of `STOPS` wait until it is asked for; another one stops the process as ever.

    Args:
        alone: Whether this is the only process. Of several each may get one signal from the terminal and one from
            torchrun at once: only one that comes `INSISTS_S` later counts.

    Yields:
        The signal that came; 0: none.
    """
    came, first_at = 0, 0.0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: came
        return

    def take_note(number: int, frame: FrameType | None) -> None:
        nonlocal came, first_at
        if came and time.monotonic() - first_at > INSISTS_S:
            restore()
            signal.raise_signal(number)
        if not came:
            came, first_at = number, time.monotonic()
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
