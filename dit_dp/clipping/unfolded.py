"""A trial whose blocks were recomputed, told as if their graphs had been kept. Pure arithmetic.

A trial must not take more memory than the step it is made for, so its blocks keep their inputs alone. What a kept
graph would have held is all there: the recomputation makes the storages of the forward again, in the same order, and
they live until the backward is through with them. So each storage of a block's forward dies when its twin does, and
the time that recomputation took is cut out.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dit_dp.clipping.lives import Life, Trial


@dataclass(frozen=True)
class Visit:
    """One run of a block's forward: the number of the call, and the instants between which it ran.

    Operations in it, and what they bring to life, have instants after `begin` up to `end`.
    """

    call: int
    begin: int
    end: int


def unfolded(trial: Trial, visits: Sequence[Visit]) -> Trial | None:
    """Return the trial as it would have been seen with every graph kept.

    Args:
        trial: Of one backward.
        visits: Of blocks, in order: one in the forward and, if the backward reached the block, one more.

    Returns:
        The trial; `None` if a recomputation made other storages than the forward, as where a cache was filled.
    """
    first: dict[int, Visit] = {}
    again: list[tuple[Visit, Visit]] = []
    for visit in visits:
        if visit.call in first:
            again.append((first[visit.call], visit))
        else:
            first[visit.call] = visit
    births = [life.born for life in trial.lives]
    clock = _Clock([visit for _, visit in again])
    lives = [Life(life.num_bytes, clock(life.born), life.dies and clock(life.dies)) for life in trial.lives]
    same: dict[int, int] = {}
    for forward, second in again:
        ours, theirs = _born(births, forward), _born(births, second)
        if [lives[i].num_bytes for i in ours] != [lives[i].num_bytes for i in theirs]:
            return None
        for index, twin in zip(ours, theirs, strict=True):
            same[twin] = index
            death = trial.lives[twin].dies
            if death is None or death > second.end + 1:  # else it went with the forward's own variables
                lives[index].dies = _later(lives[index].dies, death and clock(death))
    kept = [index for index in range(len(lives)) if index not in same]
    place = {index: number for number, index in enumerate(kept)}
    place |= {twin: place[index] for twin, index in same.items()}

    def placed(index: int | None) -> int | None:
        return None if index is None else place[index]

    return replace(
        trial,
        lives=[lives[index] for index in kept],
        weights=[
            replace(call, instant=clock(call.instant), operands=(placed(call.operands[0]), placed(call.operands[1])))
            for call in trial.weights
        ],
        backward=clock(trial.backward),
        end=clock(trial.end),
        inputs={name: tuple(place[index] for index in indices) for name, indices in trial.inputs.items()},
    )


class _Clock:
    """Tells an instant without the time that went into recomputation."""

    def __init__(self, cut: Sequence[Visit]) -> None:
        self._cut = sorted(cut, key=lambda visit: visit.begin)
        self._begins = [visit.begin for visit in self._cut]
        self._before = [0]
        for visit in self._cut:
            self._before.append(self._before[-1] + visit.end - visit.begin)

    def __call__(self, instant: int) -> int:
        number = bisect_left(self._begins, instant)  # visits that began before it
        if number == 0:
            return instant
        last = self._cut[number - 1]
        return instant - self._before[number - 1] - (min(instant, last.end) - last.begin)


def _later(one: int | None, other: int | None) -> int | None:
    """Return the later of two deaths; `None` is none."""
    return None if one is None or other is None else max(one, other)


def _born(births: Sequence[int], visit: Visit) -> range:
    """Return the indices of storages that were born in a visit; births are in order."""
    return range(bisect_right(births, visit.begin), bisect_right(births, visit.end))
