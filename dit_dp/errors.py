"""The user's mistakes, as exceptions.

Everything a user can get wrong raises a `UsageError` whose message is one line: the argument, the value
received, the values accepted and the fix. Entry points print that line and exit with code 2.
"""

from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the caller; the message names argument, value, accepted values and fix."""

    @classmethod
    def for_value(
        cls, name: str, value: object, accepted: str | Iterable[object], fix: str | None = None
    ) -> "UsageError":
        """Build the standard one-line message.

        Args:
            name: The argument or field, as the user spells it.
            value: What was received.
            accepted: A phrase, or the accepted values themselves.
            fix: What to do about it, if the accepted values do not say so already.

        Returns:
            The exception, to be raised by the caller.
        """
        wanted = accepted if isinstance(accepted, str) else ", ".join(str(item) for item in accepted)
        message = f"{name}: got {value!r}; accepted: {wanted}"
        return cls(f"{message}; {fix}" if fix else message)


class UnsupportedModelError(UsageError):
    """A method cannot run on a model; the message names the layer, the reason and the nearest fix."""


class CoupledExamplesError(UnsupportedModelError):
    """One privacy unit's loss depends on another's rows, so no per-unit gradient exists."""


class LossShapeError(UsageError):
    """The per-example loss is not a vector with one entry per example."""


class EngineStateError(UsageError):
    """An engine's methods were called out of order, or its model was changed behind its back."""


class CheckpointError(UsageError):
    """A checkpoint or a file of weights cannot be written, or is not what it should be; the message names the file."""
