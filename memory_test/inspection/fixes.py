"""Nearest replacements for layers that some method cannot run on, and what Opacus's validator says."""

import math
from typing import Any

from torch import nn

from memory_test.inspection.facts import ValidatorError


def split_reason(text: str) -> tuple[str, str]:
    """Split ``problem; fix`` as the engines write it."""
    problem, _, fix = text.partition("; ")
    return problem, fix


def replacement(module: nn.Module) -> str | None:
    """Return the nearest layer that every method runs on, or `None` if none is known."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        channels = module.num_features
        return f"GroupNorm({math.gcd(32, channels)}, {channels})"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return f"GroupNorm({module.num_features}, {module.num_features}), the same function"
    if isinstance(module, nn.Conv1d):
        return f"Conv2d with kernel (1, {module.kernel_size[0]}) on x.unsqueeze(2)"
    if isinstance(module, nn.MultiheadAttention):
        return "Linear layers for q, k, v and the output, around F.scaled_dot_product_attention"
    if isinstance(module, nn.RNNBase):
        return f"opacus.layers.DP{module.mode.partition('_')[0]}, for the opacus methods"
    if isinstance(module, nn.EmbeddingBag):
        return f"Embedding({module.num_embeddings}, {module.embedding_dim}) and a sum over positions"
    return _table_for(module) if not type(module).__module__.startswith("torch.nn.") else None


def _table_for(module: nn.Module) -> str | None:
    """Return the embedding that can hold a module's one raw table of positions."""
    raw = [p for p in module.parameters(recurse=False) if p.requires_grad]
    if len(raw) != 1 or raw[0].dim() not in (2, 3) or (raw[0].dim() == 3 and raw[0].shape[0] != 1):
        return None
    rows, width = raw[0].shape[-2:]
    return f"Embedding({rows}, {width}) in its place, looked up at arange({rows}).expand(N, {rows})"


def validator_errors(model: nn.Module) -> tuple[ValidatorError, ...]:
    """Return what Opacus's `ModuleValidator` says, with the layer it does not name; imports opacus."""
    from opacus.utils.module_utils import trainable_modules
    from opacus.validators import ModuleValidator

    found = []
    for name, module in trainable_modules(model):
        validate: Any = ModuleValidator.VALIDATORS.get(type(module))
        for error in validate(module) if validate else ():
            fix = replacement(module) or "see the message"
            found.append(_error(name or "(root)", type(module).__name__, error, fix))
    if not model.training:
        found.insert(0, _error("", "", "Model needs to be in training mode", "call model.train()"))
    assert len(found) == len(ModuleValidator.validate(model, strict=False))
    return tuple(found)


def _error(layer: str, kind: str, error: object, fix: str) -> ValidatorError:
    return ValidatorError(layer=layer, type=kind, message=" ".join(str(error).split()), fix=fix)
