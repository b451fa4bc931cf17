import pytest

from dit_dp.errors import UsageError
from dit_dp.training.schedule import PRESETS, Phase, Schedule


def test_borders_are_inclusive_and_count_from_one() -> None:
    schedule = Schedule.preset("encoder_then_full(5)")
    assert [schedule.index_at(step) for step in (1, 5, 6, 10**9)] == [0, 0, 1, 1]
    assert schedule.phases == (Phase(groups=("encoder",), end=5), Phase(groups=("all",), start=6))


def test_every_preset_is_a_schedule_by_its_name() -> None:
    for name in PRESETS:
        schedule = Schedule.preset(name.replace("(N)", "(7)").replace("(R)", "(7)"))
        assert schedule.lora_rank == (7 if name == "lora(R)" else None)


@pytest.mark.parametrize("text", ["", "fulls", "full(3)", "lora", "lora(0)", "encoder_then_full(-1)", "head\n", "x2("])
def test_what_is_no_preset_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^train: got .*accepted: full, x2, encoder_then_full\(N\)"):
        Schedule.preset(text)


def test_phases_are_written_with_groups_and_steps() -> None:
    assert Schedule.parse("encoder_then_full(5)") == Schedule.parse("encoder:1-5, full:6-")
    written = Schedule.parse("x2+backbone:1-2,lora(4)+head:3-3,all:4-9")
    assert written == Schedule(
        phases=(
            Phase(groups=("x2", "head", "backbone"), end=2),
            Phase(groups=("lora", "head"), start=3, end=3),
            Phase(groups=("all",), start=4, end=9),
        ),
        lora_rank=4,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoder:1-5,full:5-", r"^train: phases: start of phase 2: got 5; accepted: 6; they overlap$"),
        ("encoder:1-5,full:8-", r"^train: phases: start of phase 2: got 8; accepted: 6; steps between belong to no"),
        ("encoder:2-5", r"^train: phases: start of phase 1: got 2; accepted: 1; "),
        ("encoder:1-,full:6-", r"^train: phases: got 'phase 2'; accepted: no phase after one without end; "),
        (":1-5,full:6-", r"^train: :1-5: groups: got \(\); accepted: at least one group; a phase that trains nothing$"),
        ("encoder:5-3", r"^train: encoder:5-3: end: got 3; accepted: an integer >= 5; the phase starts at step 5$"),
        ("encoder:0-3", r"^train: encoder:0-3: start: got 0; "),
        ("encoder+:1-5", r"^train: encoder\+:1-5: group: got ''; accepted: a name, "),
        ("lora:1-", r"^train: lora:1-: train: got 'lora'; accepted: .*with a number >= 1"),
        ("lora(2):1-3,lora(3):4-", r"^train: got 'lora\(2\):1-3,lora\(3\):4-'; accepted: one rank of adapters; "),
        ("encoder_then_full(3):1-5", r"^train: .*got 'encoder_then_full\(3\)'; .*it has steps of its own$"),
        ("encoder:1-5,", r"^train: got ''; accepted: phases such as encoder:1-5000,"),
        ("encoder:1-5;full:6-", r"^train: got 'encoder:1-5;full:6-'; accepted: phases such as "),
        ("encoder:a-b", r"^train: got 'encoder:a-b'; accepted: phases such as "),
        ("encoder:-5", r"^train: got 'encoder:-5'; accepted: phases such as "),
        ("encoder:1-\u0665", r"^train: got .*; accepted: phases such as "),
        ("encoder:1-" + "9" * 5000, r"^train: got .*; accepted: phases such as "),
    ],
)
def test_what_are_no_phases_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        Schedule.parse(text)
    assert "\n" not in str(raised.value)


def phases(*spans: tuple[int, int | None]) -> tuple[Phase, ...]:
    return tuple(Phase(groups=("all",), start=start, end=end) for start, end in spans)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((), r"^phases: got \(\); accepted: at least one phase$"),
        (((2, None),), r"^phases: start of phase 1: got 2; accepted: 1; steps between belong to no phase$"),
        (((1, 5), (5, None)), r"^phases: start of phase 2: got 5; accepted: 6; they overlap$"),
        (((1, 5), (8, None)), r"^phases: start of phase 2: got 8; accepted: 6; steps between belong to no phase$"),
        (((1, None), (6, 9)), r"^phases: got 'phase 2'; accepted: no phase after one without end; phase 1 has no end$"),
    ],
)
def test_phases_follow_each_other(spans: tuple[tuple[int, int | None], ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(phases=phases(*spans))


def test_a_phase_trains_something_and_ends_after_it_starts() -> None:
    with pytest.raises(UsageError, match=r"^groups: got \(\); accepted: at least one group; a phase that trains noth"):
        Phase(groups=())
    with pytest.raises(UsageError, match=r"^end: got 3; accepted: an integer >= 4; the phase starts at step 4$"):
        Phase(groups=("all",), start=4, end=3)
    with pytest.raises(UsageError, match=r"^start: got 0"):
        Phase(groups=("all",), start=0)


@pytest.mark.parametrize("step", [0, 10, 1.5, True])
def test_steps_outside_of_every_phase_are_refused(step: int) -> None:
    with pytest.raises(UsageError, match=r"^step: got "):
        Schedule(phases=phases((1, 4), (5, 9))).index_at(step)
