"""What a trial of one or two units saw: lives of storages, and when weights and blocks had their turn. No torch."""

from dataclasses import dataclass, field


@dataclass
class Life:
    """One storage: its bytes, and the instants between which it lived; `dies` is `None` if it outlived the trial."""

    num_bytes: int
    born: int
    dies: int | None = None


@dataclass(frozen=True)
class WeightCall:
    """What one call contributed to one weight with operands (N, T, d) and (N, T, p).

    Attributes:
        name: The parameter.
        positions, width, out_width: T, d, p.
        element_size: Bytes of an operand's element.
        instant: When it was observed.
        operands: Indices of the operands' storages in `Trial.lives`; `None` for what is older than the trial.
    """

    name: str
    positions: int
    width: int
    out_width: int
    element_size: int
    instant: int
    operands: tuple[int | None, int | None]


@dataclass
class Trial:
    """What a trial saw.

    Attributes:
        num_units: Units that took part.
        lives: Storages in order of birth.
        weights: Calls in the order of the backward.
        backward: When the backward began.
        end: Number of instants.
        windows: (block, begin, end) of each block's forward.
        leading: Per block, the first dimension of each flat input of its call, `None` where it has none.
        inputs: Per block, the storages of its inputs that are no older than the trial.
    """

    num_units: int
    lives: list[Life] = field(default_factory=list)
    weights: list[WeightCall] = field(default_factory=list)
    backward: int = 0
    end: int = 0
    windows: list[tuple[str, int, int]] = field(default_factory=list)
    leading: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
