"""Named groups of a model's parameters: its parts, and kinds that cut across them; and low-rank adapters."""

import re
from collections.abc import Iterable

from torch import nn

from dit_dp.errors import UsageError
from dit_dp.training.schedule import ALL

_KINDS = {
    "attention": re.compile(r"(^|\.)(attn\d?|cross)\."),
    "adaln": re.compile(
        r"(^|\.)(adaLN_modulation|x2_modulation|(shift|scale|gate)_(msa|mlp)|norm1\.linear|proj_out_1)\."
    ),
    "lora": re.compile(r"\.lora_[AB]\."),
}
"""What full names of a kind contain; ``norm1.linear`` and ``proj_out_1`` are diffusers' modulations."""

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the model's own partition of its parameters; fixed ones are in no part.

    Raises:
        UsageError: The model has no `parameter_groups`.
    """
    groups = getattr(model, "parameter_groups", None)
    if groups is None:
        accepted = "a model with parameter_groups(), the names of its parameters by part"
        raise UsageError.for_value("model", type(model).__name__, accepted)
    parts: dict[str, list[str]] = groups()
    return parts


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the full names of every group that has a parameter, in the model's order: parts, ``all``, and kinds."""
    parts = parts_of(model)
    free = {name for names in parts.values() for name in names}
    names = [name for name, _ in model.named_parameters() if name in free]
    groups = {**parts, ALL: names}
    groups |= {kind: [name for name in names if pattern.search(name)] for kind, pattern in _KINDS.items()}
    light = _biases_and_norms(model)
    groups["bias_norm"] = [name for name in names if name in light]
    return {group: members for group, members in groups.items() if members}


def members(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Return the full names in any of the groups, in the model's order.

    Raises:
        UsageError: A group that the model has not.
    """
    groups = groups_of(model)
    for group in wanted:
        if group not in groups:
            fix = "give the schedule a lora_rank" if group == "lora" else None
            raise UsageError.for_value(f"group of {type(model).__name__}", group, sorted(groups), fix)
    chosen = {name for group in wanted for name in groups[group]}
    return [name for name in groups[ALL] if name in chosen]


def add_lora(model: nn.Module, rank: int) -> None:
    """Give every linear layer inside attention a low-rank adapter, in place; the model stays the function that it was.

    The adapters are peft's, without dropout and with scale 1 (``lora_alpha = rank``). Names of adapted layers change:
    ``qkv.weight`` becomes ``qkv.base_layer.weight``, beside ``qkv.lora_A.default.weight`` and ``lora_B``.

    Raises:
        UsageError: peft is not installed, the model has adapters already, or no attention to adapt.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"lora: peft cannot be imported ({cause}); pip install 'dit-dp[lora]'") from error
    if any(_KINDS["lora"].search(name) for name, _ in model.named_parameters()):
        raise UsageError("lora: the model has low-rank adapters already; build it anew")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linears if _KINDS["attention"].search(f"{name}.")]
    if not targets:
        raise UsageError.for_value("lora", type(model).__name__, "a model with linear layers inside attention")
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(config, model)


def _biases_and_norms(model: nn.Module) -> set[str]:
    """Return the full names of biases, and of all that norms have."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            if own.endswith("bias") or isinstance(module, _NORMS):
                found.add(f"{prefix}.{own}" if prefix else own)
    return found
