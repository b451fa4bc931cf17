"""The rounds of a comparison: who has a worker takes one turn a round, and nobody else runs meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from memory_test.compare import schema
from memory_test.compare.ratios import rotated
from memory_test.core.config import ExperimentConfig
from memory_test.sweep.process import Outcome, Worker
from memory_test.sweep.turns import ParentTurns

KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Has glibc keep what a CPU worker frees, as CUDA's caching allocator does. Otherwise it goes back to the operating
system by thresholds that depend on what was freed before, and the next step pays for zeroed pages, up to a tenth."""


class Player(Protocol):
    """Who takes turns."""

    def turn(self) -> bool:
        """Take a turn to its end; return whether there can be another."""


class Seat:
    """A contender's worker and the pipes to it, made once the worker has built everything or is lost.

    Attributes:
        present: Whether the worker waits for a turn.
    """

    def __init__(
        self, stack: ExitStack, config: ExperimentConfig, protocol: schema.Protocol, variables: Mapping[str, str]
    ) -> None:
        self._limit = config.timeout_s
        self._pipes = stack.enter_context(ParentTurns())
        ends = {"token": self._pipes.token, "done": self._pipes.done}
        options = {
            **ends,
            "rounds": protocol.rounds,
            "settle_steps": protocol.settle_steps,
            "of_processor": protocol.clock == "processor",
        }
        self._worker = stack.enter_context(
            Worker(config, "turns", options, pass_fds=tuple(ends.values()), variables=variables)
        )
        self._pipes.close_worker_ends()
        self.present = self._await()

    def turn(self) -> bool:
        """Pass the token and wait for the answer."""
        self._pipes.give()
        self.present = self._await()
        return self.present

    def outcome(self) -> Outcome:
        """Return what came of a worker that is no longer present."""
        return self._worker.wait(0 if self._overdue else self._limit)

    def _await(self) -> bool:
        end = self._pipes.wait(self._limit)
        self._overdue = end == "timeout"
        return end == "done"


def take_turns(players: Sequence[Player], num_turns: int, untimed: int) -> None:
    """Let everybody take its turns, in an order rotated by one from round to round.

    Whoever drops out leaves the others to go on; without the first, the baseline, there is nothing to go on for.

    Args:
        players: The baseline first.
        num_turns: Turns of each; after the last one nobody is expected to be there.
        untimed: How many of them come before the timed rounds, of which the first is not rotated.
    """
    present = list(players)
    for number in range(num_turns):
        for player in rotated(players, number - untimed):
            if player not in present or player.turn() or number == num_turns - 1:
                continue
            present.remove(player)
            if player is players[0]:
                return


def run_rounds(
    configs: Mapping[str, ExperimentConfig],
    protocol: schema.Protocol,
    say: Callable[[str], None],
    *,
    keeps_freed_memory: bool = False,
) -> dict[str, Outcome]:
    """Start a worker for every contender and let them take turns.

    Args:
        configs: By label, the baseline first.
        protocol: Rounds and warm-up.
        say: Told what goes on.
        keeps_freed_memory: On CPU, whether workers hold on to what they free.

    Returns:
        The outcomes by label. If the baseline drops out, the others are stopped and have none, unless they dropped
        out before it.
    """
    with ExitStack() as stack:
        seats: dict[str, Seat] = {}
        for label, config in configs.items():
            say(f"{label}: builds")
            seats[label] = Seat(stack, config, protocol, KEEPS_FREED_MEMORY if keeps_freed_memory else {})
            if len(seats) == 1 and not seats[label].present:
                break
        players = [seat for seat in seats.values() if seat.present]
        if next(iter(seats.values())).present:
            say(f"{protocol.rounds} rounds of {len(players)} contenders")
            take_turns(players, protocol.untimed_rounds + protocol.rounds, protocol.untimed_rounds)
        return {label: seat.outcome() for label, seat in seats.items() if not seat.present}
