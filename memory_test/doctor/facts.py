"""What the doctor finds. No torch."""

import math
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of one method.

    Attributes:
        name: Which property was checked.
        status: `refused`: the method declined the model by name, so there was nothing to measure.
        measured: The number found, in the unit that `explanation` states; `None` if none was obtained.
        bound: The largest number that passes.
        explanation: One line: what was measured; after a failure or a refusal, why.
    """

    name: str
    status: Status
    measured: float | None = None
    bound: float | None = None
    explanation: str

    @classmethod
    def of(cls, name: str, measured: float, bound: float, explanation: str) -> "Check":
        """Return a check that passes if the measured number is within its bound; NaN is not."""
        return cls(
            name=name,
            status="passed" if measured <= bound else "failed",
            measured=measured,
            bound=bound,
            explanation=explanation,
        )

    @property
    def margin(self) -> float:
        """Measured over bound: above 1 the check failed; where the bound is 0, 0 or infinity."""
        if self.measured is None or self.bound is None or math.isnan(self.measured):
            return math.inf
        if self.bound == 0:
            return 0.0 if self.measured == 0 else math.inf
        return self.measured / self.bound


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks of one method, or of the model itself.

    Attributes:
        subject: A method's name, or ``model``.
        checks: In the order in which they were made.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """`failed` if any check failed, else `refused` if any was refused."""
        found = {check.status for check in self.checks}
        return "failed" if "failed" in found else "refused" if "refused" in found else "passed"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was examined and what came out.

    Attributes:
        model: As asked for.
        num_parameters: Trainable parameters.
        num_examples: N.
        max_grad_norm: C; `None` where the oracle failed.
        num_clipped: How many of the N examples have a gradient longer than C, if that is known.
        seed: Of everything drawn.
        diagnoses: Of the model, then of each method.
    """

    model: str
    num_parameters: int
    num_examples: int
    max_grad_norm: float | None
    num_clipped: int | None
    seed: int
    diagnoses: tuple[Diagnosis, ...]

    @property
    def passed(self) -> bool:
        """Whether every check of every method passed."""
        return all(diagnosis.status == "passed" for diagnosis in self.diagnoses)
