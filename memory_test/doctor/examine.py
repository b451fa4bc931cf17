"""All checks, on a model and on methods."""

import copy
from collections.abc import Callable, Iterator

from dit_dp.clipping import attach
from dit_dp.errors import UnsupportedModelError, UsageError
from memory_test.core.custom import users_code
from memory_test.doctor import checks
from memory_test.doctor.case import Case, Reference, refer
from memory_test.doctor.facts import Check, Diagnosis
from memory_test.doctor.model_checks import coupling, determinism
from memory_test.doctor.noise import noise
from memory_test.doctor.nonfinite import nonfinite
from memory_test.doctor.trial import Trial

CHECKS: dict[str, Callable[[Trial], Check]] = {
    "coverage": checks.coverage,
    "exactness": checks.exactness,
    "float64": checks.exactness_in_float64,
    "removal": checks.removal,
    "independence": checks.independence,
    "order": checks.order,
    "accumulation": checks.accumulation,
    "empty batch": checks.emptiness,
    "non-finite": nonfinite,
    "noise": noise,
    "restoration": checks.restoration,
}
"""Of a method, by the name that each puts into its result."""

MODEL_CHECKS: dict[str, Callable[[Case], Check]] = {"determinism": determinism, "coupling": coupling}
"""Of a model and its loss: what no method can mend."""


def examine_model(case: Case, max_grad_norm: float | None = None) -> tuple[Diagnosis, Reference | None]:
    """Check the model and ask the oracle.

    Args:
        case: At least two units; left untouched.
        max_grad_norm: C; default: what `refer` chooses.

    Returns:
        The findings, and the oracle's answer, or `None` where it has none, which is one of the findings.
    """
    found = [_guarded(name, lambda check=check: check(case)) for name, check in MODEL_CHECKS.items()]  # type: ignore[misc]
    reference = None
    try:
        with users_code("the float64 loop over examples"):
            reference = refer(case, max_grad_norm)
    except UsageError as error:
        found.append(Check(name="reference", status="failed", explanation=str(error)))
    return Diagnosis(subject="model", checks=tuple(found)), reference


def examine_method(case: Case, method: str, reference: Reference, seed: int = 0) -> Diagnosis:
    """Run every check of a method.

    Args:
        case: Left untouched; runs use copies of its model.
        method: A private key of `METHODS`.
        reference: The oracle's answer for `case`.
        seed: Of the units and the noise that are drawn.

    Returns:
        The checks; only the first if the method refuses the model.
    """
    trial = Trial(case, method, reference, seed)
    return Diagnosis(subject=method, checks=tuple(_until_refused(trial)))


def _until_refused(trial: Trial) -> Iterator[Check]:
    for name, check in CHECKS.items():
        found = _guarded(name, lambda check=check: check(trial))  # type: ignore[misc]
        yield found
        if found.status == "refused":
            return


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check; what it raises is its finding: a refusal if it names what the method cannot take, else a failure.

    Coverage comes first, so a mistake that it is told of is one of the case's: units where a peer knows only rows.
    """
    try:
        with users_code("it"):
            return check()
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, UnsupportedModelError if name != "coverage" else UsageError):
            return Check(name=name, status="refused", explanation=str(cause).removeprefix("model: "))
        return Check(name=name, status="failed", explanation=str(error))


def examine_attachment(case: Case, method: str) -> Diagnosis:
    """Ask a method whether it takes a model, all that can be asked where the oracle has no answer."""

    def attached() -> Check:
        attach(copy.deepcopy(case.model), method).detach()
        return Check(name="exactness", status="failed", explanation="nothing to compare with: see model, reference")

    return Diagnosis(subject=method, checks=(_guarded("coverage", attached),))
