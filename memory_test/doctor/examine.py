"""All checks, on a model and on methods."""

from collections.abc import Callable, Iterator, Sequence

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UnsupportedModelError, UsageError
from memory_test.doctor import checks
from memory_test.doctor.case import Case, Reference, Trial
from memory_test.doctor.coupling import coupling
from memory_test.doctor.facts import Check, Diagnosis
from memory_test.doctor.noise import noise
from memory_test.doctor.nonfinite import nonfinite
from memory_test.inspection.subject import users_code

CHECKS: dict[str, Callable[[Trial], Check]] = {
    "coverage": checks.coverage,
    "exactness": checks.exactness,
    "removal": checks.removal,
    "independence": checks.independence,
    "order": checks.order,
    "accumulation": checks.accumulation,
    "empty batch": checks.emptiness,
    "non-finite": nonfinite,
    "noise": noise,
    "restoration": checks.restoration,
}
"""By the name that each puts into its result."""

OURS = tuple(name for name, method in METHODS.items() if method.private and not method.peer)
"""Private methods of this project."""


def examine_model(case: Case) -> Diagnosis:
    """Check what no method can mend: that examples do not depend on each other."""
    return Diagnosis(subject="model", checks=(_guarded("coupling", lambda: coupling(case)),))


def examine_method(case: Case, method: str, reference: Reference, seed: int = 0) -> Diagnosis:
    """Run every check of a method.

    Args:
        case: Left untouched; runs use copies of its model.
        method: A private key of `METHODS`.
        reference: The oracle's answer for `case`.
        seed: Of the rows and the noise that are drawn.

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
    """Run a check; what it raises is its finding."""
    try:
        with users_code("it"):
            return check()
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, UnsupportedModelError):
            return Check(name=name, status="refused", explanation=str(cause).removeprefix("model: "))
        return Check(name=name, status="failed", explanation=str(error))


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Return the methods asked for, all of ours if none; refuse unknown ones and those that are not private."""
    private = [name for name, method in METHODS.items() if method.private]
    for name in methods:
        if name not in private:
            raise UsageError.for_value("methods", name, private)
    return tuple(dict.fromkeys(methods)) or OURS
