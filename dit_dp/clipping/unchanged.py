"""What must not change behind an engine's back: the sum in `.grad`, and the model since it was attached."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from dit_dp.errors import EngineStateError


class HeldGradients:
    """What an engine left in `.grad`, while the sum is there: the tensors, and how often each was written to.

    Args:
        parameters: By name; one without a gradient must stay so.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._left = [(name, p, p.grad, _version(p.grad)) for name, p in parameters]

    def require_same(self, call: str) -> None:
        """Refuse a gradient that is another tensor now, or was written to.

        Raises:
            EngineStateError: There is one; names the parameter.
        """
        for name, parameter, gradient, version in self._left:
            if parameter.grad is not gradient or _version(gradient) != version:
                raise EngineStateError(
                    f"{call}: the gradient of parameter {name} was changed from outside since the last accumulate, "
                    f"and with it the sum; call the engine's zero_grad and begin the step again, without another "
                    f"backward or zero_grad before privatize"
                )


def _version(gradient: Tensor | None) -> int:
    """Return how often a gradient was written to in place."""
    return 0 if gradient is None else gradient._version


def require_attached(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    same: Callable[[Tensor, Tensor | None], bool],
) -> None:
    """Refuse a model whose modules or trainable parameters are not those that were attached.

    Args:
        model: As it is now.
        modules: By name, as they were.
        parameters: The trainable ones, by name, as they were.
        same: Whether a parameter found in the model is the one that was attached.

    Raises:
        EngineStateError: Something was added, removed, replaced, frozen or unfrozen; names it.
    """
    missing_modules, missing, seen = set(modules), set(parameters), set[nn.Parameter]()
    for prefix, module in model.named_modules():
        attached = modules.get(prefix)
        if attached is None or attached is not module:
            raise _changed(f"module {prefix}", "replaced" if prefix in modules else "added")
        missing_modules.discard(prefix)
        for own, parameter in attached._parameters.items():
            if parameter is None or parameter in seen:  # a tied one goes by its first name
                continue
            seen.add(parameter)
            name = f"{prefix}.{own}" if prefix else own
            if parameter.requires_grad != same(parameter, parameters.get(name)):
                replaced = name in parameters and parameter.requires_grad
                raise _changed(name, "replaced" if replaced else "frozen or unfrozen")
            missing.discard(name)
    if missing_modules or missing:
        raise _changed(f"module {min(missing_modules)}" if missing_modules else min(missing), "removed")


def _changed(what: str, how: str) -> EngineStateError:
    return EngineStateError(f"model: {what} was {how} after attach; detach, change the model, attach again")
