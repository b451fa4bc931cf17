"""Workers that take turns: the parent passes a token down a pipe, the worker steps and answers down another.

A byte each way a turn. Whoever waits is blocked in `read` or `select` and takes no processor time. A worker answers
once before its first turn, when everything is built, and ends its last turn by exiting, so that what it does at its
end falls into its own turn.
"""

import contextlib
import os
import select
from collections.abc import Callable
from typing import Literal, Self

TurnEnd = Literal["done", "exited", "timeout"]


def untimed_turns(warmup: int) -> int:
    """Return the turns before the timed ones: the first step, whose optimizer state is born in it, and warm-up."""
    return 1 + warmup


class WorkerTurns:
    """The worker's end: a gate for `measure.run_loop`.

    Args:
        token: File descriptor to read permission from.
        done: File descriptor to announce the end of a turn on.
        steps_per_turn: Steps taken for one token.
        rest: Called at the end of every turn, to finish and give back what others need.
    """

    def __init__(self, token: int, done: int, steps_per_turn: int, rest: Callable[[], None]) -> None:
        self._token, self._done, self._steps_per_turn, self._rest = token, done, steps_per_turn, rest

    def __call__(self, step: int) -> None:
        """Before the first step of a turn: end the last one and wait for the next.

        Raises:
            EOFError: The parent is gone.
        """
        if (step - 1) % self._steps_per_turn:
            return
        self._rest()
        os.write(self._done, b".")
        if not os.read(self._token, 1):
            raise EOFError("the process that passes the token is gone")


class ParentTurns:
    """The parent's end of one worker; a context that closes the pipes."""

    def __init__(self) -> None:
        self.token, self._give = os.pipe()
        self._await, self.done = os.pipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close_worker_ends()
        os.close(self._give)
        os.close(self._await)

    def close_worker_ends(self) -> None:
        """Close the worker's ends here, once it has inherited them: only then does its exit end the pipe."""
        for name in ("token", "done"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)

    def give(self) -> None:
        """Pass the token; to a worker that exited, nothing happens."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._give, b".")

    def wait(self, timeout_s: float) -> TurnEnd:
        """Wait until the worker has built everything, or its turn has ended, or it exits, or time is up (s)."""
        ready, _, _ = select.select([self._await], [], [], timeout_s)
        if not ready:
            return "timeout"
        return "done" if os.read(self._await, 1) else "exited"
