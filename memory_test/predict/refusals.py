"""What cannot be imagined, in one line each: the user's mistakes, and operations whose result depends on data."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from dit_dp.errors import UsageError
from memory_test.predict.asker import is_models

_DEPENDS = frozenset({"DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"})
_NO_KERNEL = frozenset({"UnsupportedOperatorException", "UnsupportedFakeTensorException"})
_READ = "_local_scalar_dense"
"""How torch calls reading one number: `.item()`, `.tolist()`, `float(...)`, `if` on a tensor."""


@contextlib.contextmanager
def named(model: str) -> Iterator[None]:
    """Turn what a model cannot do without data into one line that names the operation and where it stands.

    Args:
        model: Its name, for the message.

    Raises:
        UsageError: Control flow that depends on data, an operation without a fake kernel, or whatever else the model's
            code raised.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None and isinstance(error, UsageError):
            raise
        text = " ".join(str(error).split())
        reason = reason or f"cannot be imagined: {type(error).__name__}: {text[:300]}"
        raise UsageError(f"model: {model}: {reason}") from error


def _reason(error: BaseException) -> str | None:
    """Return which operation cannot be imagined; `None` if it is something else."""
    for each in _chain(error):
        name, text = type(each).__name__, " ".join(str(each).split())
        operation = re.search(r"\b\w+::[\w.]+|\b\w+\.\w+\.\w+\b", text)
        which = operation[0] if operation else text[:120]
        if name in _DEPENDS:
            read = " (.item(), or a condition on a tensor)" * (_READ in which)
            return (
                f"its shapes or control flow depend on data: {which}{read}{_place(each)}, and a prediction has "
                "no data; measure it with memory-test run"
            )
        if name in _NO_KERNEL or "no fake impl registered" in text or "Meta kernel" in text:
            return (
                f"{which}{_place(each)} has no fake kernel: register one (torch.library.register_fake), or measure it "
                "with memory-test run"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from or during."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        yield each
        each = each.__cause__ or each.__context__


def _place(error: BaseException) -> str:
    """Return the innermost line of code that is the model's own, if any."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if is_models(frame):
            return f" in {Path(frame.f_code.co_filename).name}, line {line}"
    return ""
