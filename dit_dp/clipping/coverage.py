"""Which modules layers under watch can stand for, and why not the others."""

from collections.abc import Iterator

from torch import nn

from dit_dp.clipping.rules import COUPLED, Rule, rule_for
from dit_dp.errors import UnsupportedModelError

HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules of torch's that use no parameter themselves: what they hold is raw."""


def refusal(module: nn.Module) -> str | None:
    """Return why a module with parameters of its own (or that couples examples) is not covered, or `None`."""
    if isinstance(module, COUPLED):
        return "it mixes the examples of a batch; use GroupNorm or LayerNorm"
    rule = rule_for(module)
    if rule is not None:
        made = [n for n in ("weight", "bias") if not isinstance(getattr(module, n, None), nn.Parameter | None)]
        return f"its {made[0]} is computed, not a parameter; undo the reparametrisation" if made else rule.check(module)
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, HOLDERS):
        names = ", ".join(name for name, p in module.named_parameters(recurse=False) if p.requires_grad)
        return (
            f"no rule for {type(module).__name__} with parameters of its own ({names}); "
            f"build it of Linear, Conv2d, Embedding and norm layers, or freeze them"
        )
    return None


def covered(module: nn.Module, name: str) -> bool:
    """Return whether a module's rule covers its parameter of this name; others are raw."""
    return name in ("weight", "bias") and rule_for(module) is not None


def layers_to_watch(model: nn.Module, method: str) -> Iterator[tuple[str, nn.Module, Rule]]:
    """Yield the layers whose trainable parameters a rule covers; the model's own modules may hold raw ones.

    Raises:
        UnsupportedModelError: Some module has none; names it, the reason and the fix.
    """
    for name, module in model.named_modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, COUPLED) or trains:
            reason = refusal(module)
            if reason is not None:
                raise UnsupportedModelError(f"model: {method} cannot run on layer {name or '(root)'}: {reason}")
        rule = rule_for(module)
        if trains and rule is not None:
            yield name, module, rule


def read_elsewhere(name: str) -> UnsupportedModelError:
    """Return the error for a parameter that a rule covers and something else reads too."""
    return UnsupportedModelError(
        f"model: parameter {name} is used outside its layer's forward, so its per-example gradient is unknown; "
        f"call the layer instead of reading its weight, or freeze it"
    )
