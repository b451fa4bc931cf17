"""What cannot be imagined, in one line each: the user's mistakes, and operations whose result depends on data."""

import contextlib
import re
from collections.abc import Iterator

from dit_dp.errors import UsageError

_DEPENDS = frozenset({"DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"})
_NO_KERNEL = frozenset({"UnsupportedOperatorException", "UnsupportedFakeTensorException"})


@contextlib.contextmanager
def named(model: str) -> Iterator[None]:
    """Turn what a model cannot do without data into one line that names the operation.

    Args:
        model: Its name, for the message.

    Raises:
        UsageError: Control flow that depends on data, an operation without a fake kernel, or whatever else the model's
            code raised.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"model: {model}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        name, text = type(each).__name__, " ".join(str(each).split())
        operation = re.search(r"aten[.:]+[\w.]+|[\w]+::[\w.]+", text)
        which = operation[0] if operation else text[:120]
        if name in _DEPENDS:
            return f"its shapes or control flow depend on data ({which}), which a prediction has none of; measure it"
        if name in _NO_KERNEL or "no fake impl registered" in text or "Meta kernel" in text:
            return f"{which} has no fake kernel: register one (torch.library.register_fake), or measure it"
    text = " ".join(str(error).split())
    return f"cannot be imagined: {type(error).__name__}: {text[:300]}"
