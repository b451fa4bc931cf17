"""Which modules layers under watch can stand for, and why not the others."""

from torch import nn

from dit_dp.clipping.rules import COUPLED, rule_for

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
