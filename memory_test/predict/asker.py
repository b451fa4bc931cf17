"""Whose code is asking: the measuring loop's and its libraries', or a model's."""

import sys
from types import FrameType

from memory_test.core import measure

_LIBRARIES = frozenset({"torch", "opacus", "dit_dp", "memory_test"}) | sys.stdlib_module_names


def is_models(frame: FrameType) -> bool:
    """Return whether a frame is neither of this project nor of the libraries it calls."""
    return _module(frame).partition(".")[0] not in _LIBRARIES


def a_model_asks() -> bool:
    """Return whether what is called now is called by a model's own code, rather than by Opacus or the loop itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_models(frame):
            return True
        if _module(frame) == measure.__name__ or _module(frame).startswith("opacus."):
            return False
        frame = frame.f_back
    return False


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
