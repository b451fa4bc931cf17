"""From events to categories, on hand-made logs."""

from hypothesis import given
from hypothesis import strategies as st

from memory_test.core.breakdown import (
    MAX_TIMELINE_POINTS,
    Event,
    Log,
    Mark,
    Tag,
    allocations,
    breakdown,
    peak_within,
    running_total,
    span,
    timeline,
)


def make_log(script: list[tuple[str, int, int]], tags: list[Tag] | None = None) -> Log:
    """Build a log from (phase or '', address, size) rows; a row with a phase is a mark of step 1."""
    events: list[Event] = []
    marks: list[Mark] = []
    for phase, address, size in script:
        time_s = float(len(events) + len(marks))
        if phase and not size:
            marks.append(Mark(len(events), time_s, 1, phase))
        else:
            events.append(Event(time_s, address, size, scope=phase == "scope"))
    return Log(events, marks, tags or [])


STEP = [
    ("", 1, 100),  # parameters, before the step
    ("input", 0, 0),
    ("", 2, 10),
    ("forward", 0, 0),
    ("", 3, 50),  # saved
    ("", 4, 7),  # temporary
    ("", 4, -7),
    ("backward", 0, 0),
    ("", 5, 30),  # gradient
    ("scope", 6, 20),  # Gram buffer
    ("", 6, -20),
    ("", 3, -50),
    ("noise", 0, 0),
    ("", 4, 30),  # noise, at the temporary's address
    ("", 4, -30),
    ("optimizer", 0, 0),
    ("", 7, 3),
    ("idle", 0, 0),
]
TAGS = [Tag(0, 1, "parameters"), Tag(1, 2, "input"), Tag(3, 5, "gradients"), Tag(4, 5, "gradients")]


def test_peak_is_where_most_is_held() -> None:
    log = make_log(STEP)
    peak, position = peak_within(running_total(log.events), span(log, [1]))
    assert peak == 100 + 10 + 50 + 30 + 20
    assert log.events[position].address == 6


def test_breakdown_at_the_peak_names_every_byte() -> None:
    log = make_log(STEP, TAGS)
    peak, position = peak_within(running_total(log.events), span(log, [1]))
    found = {name: size for name, size in breakdown(log, position, peak).items() if size}
    assert found == {
        "parameters": 100,
        "input": 10,
        "saved_activations": 50,
        "gradients": 30,
        "kept_for_clipping": 20,
    }


def test_what_the_log_does_not_explain_is_shown() -> None:
    log = make_log(STEP, TAGS)
    peak, position = peak_within(running_total(log.events), span(log, [1]))
    assert breakdown(log, position, peak + 512)["unattributed"] == 512


def test_noise_and_temporaries() -> None:
    log = make_log(STEP, TAGS)
    in_noise = next(i for i, e in enumerate(log.events) if e.address == 4 and e.size == 30)
    assert breakdown(log, in_noise, 0)["noise"] == 30
    in_forward = next(i for i, e in enumerate(log.events) if e.address == 4 and e.size == 7)
    assert breakdown(log, in_forward, 0)["other"] == 7


def test_phase_peaks_count_what_was_held_at_their_start() -> None:
    log = make_log(STEP)
    assert peak_within(running_total(log.events), span(log, [1], "optimizer"))[0] == 100 + 10 + 30 + 3


def test_a_tag_on_a_reused_address_belongs_to_the_later_allocation() -> None:
    log = make_log(
        [("forward", 0, 0), ("", 1, 8), ("", 1, -8), ("", 1, 16), ("backward", 0, 0)], [Tag(1, 1, "gradients")]
    )
    assert breakdown(log, 0, 8)["gradients"] == 0
    assert breakdown(log, 2, 16)["gradients"] == 16


def test_release_of_something_older_than_the_log_is_skipped() -> None:
    assert allocations([Event(0.0, 9, -5), Event(1.0, 9, 5)])[0].size == 5


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 1000)), max_size=60))
def test_breakdown_always_adds_up(moves: list[tuple[int, int]]) -> None:
    held: dict[int, int] = {}
    script: list[tuple[str, int, int]] = [("forward", 0, 0)]
    for address, size in moves:
        if address in held:
            script.append(("", address, -held.pop(address)))
        else:
            held[address] = size
            script.append(("", address, size))
    log = make_log(script, [Tag(0, 1, "parameters")])
    totals = running_total(log.events)
    peak, position = peak_within(totals, span(log, [1]))
    assert sum(breakdown(log, position, peak).values()) == peak


def test_timeline_keeps_the_peak_of_a_long_step() -> None:
    script: list[tuple[str, int, int]] = [("forward", 0, 0)]
    for index in range(5000):
        size = 10_000 if index == 3333 else 10
        script += [("", index, size), ("", index, -size)]
    drawn = timeline(make_log(script), 1)
    assert drawn is not None
    assert max(drawn.allocated_bytes) == 10_000
    assert len(drawn.time_s) <= MAX_TIMELINE_POINTS + 1
    assert drawn.time_s == sorted(drawn.time_s)
