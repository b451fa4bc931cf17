"""Ctrl-C at the end of a step, so that what was paid for can be kept. No torch."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def waiting(*, waits: bool) -> Iterator[Callable[[], bool]]:
    """Have the first Ctrl-C wait until it is asked for; the second one interrupts as ever.

    Args:
        waits: Whether it does. Several processes would stop after different steps, so theirs does not.

    Yields:
        Whether there was a Ctrl-C.
    """
    asked = False
    if not waits or threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return

    def take_note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, take_note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
