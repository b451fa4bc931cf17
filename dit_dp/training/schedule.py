"""What trains when, as plain data. No torch, so that a command line can validate against it.

Steps count from 1. A phase holds from its start to its end, both included: of ``encoder_then_full(N)`` steps 1 ... N
train the encoder alone, and step N + 1 is the first that trains everything. In text, ``encoder:1-N,full:N+1-``.
"""

import re
from dataclasses import dataclass
from typing import Self

from dit_dp import validate
from dit_dp.errors import UsageError

ALL = "all"
"""The group of every parameter that is not fixed."""

PRESETS: dict[str, str] = {
    "full": "everything",
    "x2": "the x2 branch and the head, on a frozen backbone",
    "encoder_then_full(N)": "for N steps the encoder alone, then everything",
    "attention": "everything inside attention",
    "bias_norm": "biases, and scales of norms (BitFiT)",
    "adaln": "what scales, shifts and gates",
    "lora(R)": "low-rank adapters of rank R on the linears of attention (peft)",
    "head": "the final layer",
}
"""Schedules by name, and what they train."""

PHASES = "phases such as encoder:1-5000,encoder+head:5001-9000,full:9001-"
"""How phases are written: groups or presets joined by ``+``, a colon, the first step, ``-``, the last or nothing."""

_PRESET = re.compile(r"(\w+)(?:\(([0-9]{1,15})\))?")
_PHASE = re.compile(r"([^:]*):([0-9]{1,15})-([0-9]{1,15})?")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps during which one set of parameters trains.

    Attributes:
        groups: What trains: parts of the model (its `parameter_groups`), or kinds of parameter: ``all``,
            ``attention``, ``bias_norm``, ``adaln``, ``lora``.
        start: First step.
        end: Last step; `None`: as long as training goes on.

    Raises:
        UsageError: No group, or steps that are none.
    """

    groups: tuple[str, ...]
    start: int = 1
    end: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.groups:
            raise UsageError.for_value("groups", self.groups, "at least one group", "a phase that trains nothing")
        validate.integer("start", self.start, fix="steps count from 1")
        if self.end is not None:
            validate.integer("end", self.end, minimum=self.start, fix=f"the phase starts at step {self.start}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases, one after the other.

    Attributes:
        phases: In order, from step 1 on, without gap or overlap.
        lora_rank: Rank of the low-rank adapters that the model is given; `None`: none.

    Raises:
        UsageError: Phases that overlap, leave steps out or come after one without end.
    """

    phases: tuple[Phase, ...] = (Phase(groups=(ALL,)),)
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        """Check that the phases follow each other."""
        if not self.phases:
            raise UsageError.for_value("phases", self.phases, "at least one phase")
        if self.lora_rank is not None:
            validate.integer("lora_rank", self.lora_rank)
        wanted: int | None = 1
        for number, phase in enumerate(self.phases, start=1):
            if wanted is None:
                fix = f"phase {number - 1} has no end"
                raise UsageError.for_value("phases", f"phase {number}", "no phase after one without end", fix)
            if phase.start != wanted:
                kind = "they overlap" if phase.start < wanted else "steps between belong to no phase"
                raise UsageError.for_value(f"phases: start of phase {number}", phase.start, str(wanted), kind)
            wanted = None if phase.end is None else phase.end + 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the schedule of a preset, or of phases such as ``encoder:1-5000,encoder+head:5001-9000,full:9001-``.

        A phase's name is a preset's, ``x2`` the branch with the head, or else a group's of the model.

        Raises:
            UsageError: Text that is neither, or phases that do not follow each other.
        """
        if ":" not in text:
            return cls.preset(text)
        phases, ranks = [], set()
        for part in map(str.strip, text.split(",")):
            match = _PHASE.fullmatch(part)
            if match is None:
                raise UsageError.for_value("train", part, PHASES)
            names, start, end = match.groups()
            try:
                chosen = [cls._named(name) for name in names.split("+")] if names else []
                groups = tuple(dict.fromkeys(group for one in chosen for group in one.phases[0].groups))
                phases.append(Phase(groups=groups, start=int(start), end=int(end) if end else None))
            except UsageError as error:
                raise UsageError(f"train: {part}: {error}") from None
            ranks |= {one.lora_rank for one in chosen} - {None}
        if len(ranks) > 1:
            raise UsageError.for_value("train", text, "one rank of adapters", "they stay what they are in all phases")
        try:
            return cls(phases=tuple(phases), lora_rank=ranks.pop() if ranks else None)
        except UsageError as error:
            raise UsageError(f"train: {error}") from None

    @classmethod
    def _named(cls, name: str) -> Self:
        """Return what one name in a phase trains, as a schedule of one phase: a preset, or a group of the model."""
        match = _PRESET.fullmatch(name)
        if match is None:
            raise UsageError.for_value("group", name, "a name, or a preset such as lora(8)")
        if match[2] is None and match[1] not in {preset.partition("(")[0] for preset in PRESETS}:
            return cls(phases=(Phase(groups=(name,)),))
        found = cls.preset(name)
        if len(found.phases) > 1:
            raise UsageError.for_value("group", name, "a group, or a preset of one phase", "it has steps of its own")
        return found

    @classmethod
    def preset(cls, text: str) -> Self:
        """Return the schedule that a preset names, such as ``full``, ``encoder_then_full(5000)`` or ``lora(8)``.

        Raises:
            UsageError: No preset, or a number that is missing, not wanted or below 1.
        """
        match = _PRESET.fullmatch(text)
        name, number = match.groups() if match else (text, None)
        takes_number = {preset.partition("(")[0]: "(" in preset for preset in PRESETS}
        if takes_number.get(name) != (number is not None) or (number is not None and int(number) < 1):
            accepted = f"{', '.join(PRESETS)}, or {PHASES}"
            raise UsageError.for_value("train", text, accepted, "with a number >= 1 for N or R")
        if name == "encoder_then_full":
            steps = int(number or 0)
            return cls(phases=(Phase(groups=("encoder",), end=steps), Phase(groups=(ALL,), start=steps + 1)))
        groups = {"full": (ALL,), "x2": ("x2", "head")}.get(name, (name,))
        return cls(phases=(Phase(groups=groups),), lora_rank=None if name != "lora" else int(number or 0))

    def index_at(self, step: int) -> int:
        """Return the number, from 0, of the phase that a step belongs to.

        Raises:
            UsageError: The step is no integer from 1 on, or after the last phase.
        """
        validate.integer("step", step, fix="steps count from 1")
        for index, phase in enumerate(self.phases):
            if phase.end is None or step <= phase.end:
                return index
        raise UsageError.for_value("step", step, f"1 to {self.phases[-1].end}", "the last phase ends there")
