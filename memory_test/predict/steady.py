"""A steady step written again: from the second on, steps are alike, event by event."""

from collections.abc import Sequence
from dataclasses import replace

from memory_test.core.breakdown import Tag
from memory_test.predict.replay import Place
from memory_test.predict.trace import Trace


def with_another_step(
    trace: Trace, places: Sequence[Place], tags: Sequence[Tag]
) -> tuple[Trace, list[Place], list[Tag]] | None:
    """Return a run whose last step is taken once more, as if it had been traced.

    Each storage born in the step is born again. What an earlier step left and the last one released, such as a batch,
    stands for what the last one leaves in its turn.

    Args:
        trace: Of at least two steps: the first differs from all others.
        places: Where its phases begin, the last of which is where the last step ends.
        tags: Which storages were whose.

    Returns:
        The three of the longer run; `None` if the step leaves something else than it was left: the next is not like it.
    """
    first = next(index for index, place in enumerate(places) if place.step == places[-1].step)
    start, end = places[first].position, places[-1].position
    inside, tail = trace.events[start:end], trace.events[end:]
    old, all_born = (len(set(trace.events[:position])) for position in (start, end))
    released = sorted(index for index in inside if index < old)
    living = set[int]()
    for index in inside:
        living ^= {index}
    left = sorted(index for index in living if index >= old)
    if [trace.storages[index] for index in released] != [trace.storages[index] for index in left]:
        return None
    again = {index: index + all_born - old for index in range(old, len(trace.storages))}
    moved = again | dict(zip(released, left, strict=True))
    begun = trace.event_operations
    ran = slice(places[first].operations, places[-1].operations)
    num_operations = ran.stop - ran.start
    longer = Trace(
        storages=[*trace.storages[:all_born], *trace.storages[old:]],
        events=[
            *trace.events[:end],
            *(moved.get(index, index) for index in inside),
            *(again.get(index, index) for index in tail),
        ],
        operations=[*trace.operations[: ran.stop], *trace.operations[ran.start :]],
        event_operations=[*begun[:end], *(count + num_operations for count in begun[start:])],
    )
    repeated = [
        replace(p, position=p.position + end - start, step=p.step + 1, operations=p.operations + num_operations)
        for p in places[first:]
    ]
    new_tags = [
        replace(tag, mark=tag.mark + len(repeated), address=moved.get(tag.address, tag.address))
        for tag in tags
        if tag.mark >= first
    ]
    return longer, [*places, *repeated], [*tags, *new_tags]
