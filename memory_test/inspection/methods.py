"""Which method can run on which layer, by which rule; what only a forward pass can tell is taken from the probe."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from dit_dp.clipping.engine import Engine
from dit_dp.clipping.registry import METHODS, attach, engine_class
from dit_dp.clipping.rules import COUPLED, rule_for
from dit_dp.clipping.watched import WatchedEngine
from dit_dp.errors import UsageError
from memory_test.core.custom import users_code
from memory_test.inspection.facts import Call, MethodVerdict, RuleUse
from memory_test.inspection.fixes import replacement, split_reason
from memory_test.inspection.probe import Probe

BY_SHAPE = "by shape"


@dataclass(frozen=True)
class _Layer:
    """A layer and what the probe saw of it.

    Attributes:
        name: Path from the root, ``(root)`` for the root.
        module: The layer.
        calls: Its calls.
        num_examples: N.
        unused: Its trainable parameters that the output does not depend on.
        inside: The ancestor that Opacus takes as a whole by vmap, if any.
        tied: Other layers that hold one of its parameters.
    """

    name: str
    module: nn.Module
    calls: tuple[Call, ...]
    num_examples: int | None
    unused: tuple[str, ...]
    inside: str | None
    tied: tuple["_Layer", ...] = ()


def judge_methods(model: nn.Module, probe: Probe) -> tuple[MethodVerdict, ...]:
    """Return a verdict for every entry of `METHODS`; imports opacus."""
    layers = _layers(model, probe)
    return tuple(_judge(method, model, layers, probe) for method in METHODS)


def _judge(method: str, model: nn.Module, layers: list[_Layer], probe: Probe) -> MethodVerdict:
    facts = METHODS[method]
    rules = _rules(method, layers, probe) if facts.private else ()
    refusal = None
    if all(use.rule != "none" for use in rules):
        try:
            with users_code("attaching it"):
                attach(model, method, 1.0).detach()
        except UsageError as error:
            cause = error.__cause__
            refusal = str(cause if isinstance(cause, UsageError) else error).removeprefix("model: ")
    supported = refusal is None and all(use.rule != "none" for use in rules)
    return MethodVerdict(method=method, peer=facts.peer, supported=supported, refusal=refusal, rules=rules)


def _rules(method: str, layers: list[_Layer], probe: Probe) -> tuple[RuleUse, ...]:
    """Group layers by type and treatment, types in the model's order."""
    engine = engine_class(method)
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for layer in layers:
        treatment = (type(layer.module).__name__, *_treatment(method, engine, layer, probe))
        grouped.setdefault(treatment, []).append(layer.name)
    order = list(dict.fromkeys(kind for kind, *_ in grouped))
    uses = [
        RuleUse(type=kind, rule=rule, reason=reason, fix=fix, layers=tuple(names))
        for (kind, rule, reason, fix), names in grouped.items()
    ]
    return tuple(sorted(uses, key=lambda use: (order.index(use.type), -len(use.layers))))


def _treatment(method: str, engine: type[Engine], layer: _Layer, probe: Probe) -> tuple[str, str, str]:
    """Return rule, reason and fix for one layer."""
    rule, reason = engine.layer_rule(layer.module)
    if rule == "none":
        problem, fix = split_reason(reason)
        return "none", problem, replacement(layer.module) or fix
    for check in _checks(method, layer, probe):
        found = check(layer)
        if found is not None:
            problem, fix = split_reason(found)
            return "none", problem, (replacement(layer.module) if check is _one_tensor else None) or fix
    if layer.inside is not None and method in _HOOKED:
        return "functorch", f"inside {layer.inside}, which vmap takes as a whole", ""
    if issubclass(engine, WatchedEngine) and rule in ("ghost", "embedding"):
        return *_rule_at_shape(engine, rule, reason, layer, probe), ""
    return rule, reason, ""


Check = Callable[[_Layer], str | None]


# --- what the probe decides ---------------------------------------------------------------------------------------


def _rule_at_shape(engine: type[WatchedEngine], rule: str, reason: str, layer: _Layer, probe: Probe) -> tuple[str, str]:
    """Return the concrete rule of an engine of ours at the shapes that were seen."""
    weight = layer.module.get_parameter("weight")
    family = (layer, *layer.tied)
    if not weight.requires_grad:
        return "direct", "only the bias trains"
    if any(isinstance(member.module, nn.Embedding) for member in family):
        if len(family) == 1:
            return rule, reason
        return "direct", "an embedding tied to another layer: their gradients are added up"
    if getattr(layer.module, "groups", 1) != 1:
        return "direct", "grouped convolution: per-example gradient, then its norm"
    positions = sum(_positions(member.module, call) for member in family for call in member.calls)
    if positions == 0:
        why = "shapes unknown" if probe.failure else "the forward pass does not call it"
        return BY_SHAPE, f"depends on its shapes: {why}"
    width, out_width = weight[0].numel(), weight.shape[0]
    return engine.norm_rule(positions, width, out_width)


def _positions(module: nn.Module, call: Call) -> int:
    """Return T of one call: what lies between examples and features, or a convolution's output positions."""
    shape = call.outputs[0]
    between = shape[2:] if isinstance(module, nn.Conv2d) else shape[1:-1]
    positions = 1
    for size in between:
        positions *= size
    return positions


def _layers_own(check: Check) -> Check:
    """Return a check of layers' calls for engines that watch raw parameters where they are read, called or not."""

    def checked(layer: _Layer) -> str | None:
        return None if rule_for(layer.module) is None else check(layer)

    return checked


def _first_dimension(layer: _Layer) -> str | None:
    """Every method takes the first dimension for the examples'."""
    if layer.num_examples is None:
        return None
    for call in layer.calls:
        if call.inputs and call.inputs[0][:1] != (layer.num_examples,):
            got = f"got {call.inputs[0][0]} rows" if call.inputs[0] else "got a scalar"
            return f"{got} for {layer.num_examples} examples; make the first dimension the examples'"
    return None


def _read_outside(layer: _Layer) -> str | None:
    """Engines that watch calls do not see a weight that is read."""
    if layer.calls or layer.unused:
        return None
    return "never called, yet its parameters are used; call the layer instead of reading its weight, or freeze it"


def _unused(layer: _Layer) -> str | None:
    """Opacus finds no per-example gradient."""
    if not layer.unused:
        return None
    return f"the output does not depend on its {' and '.join(layer.unused)}; freeze it"


def _by_keyword(layer: _Layer) -> str | None:
    """Opacus's hooks get positional arguments only."""
    if all(call.positional for call in layer.calls):
        return None
    return "called by keyword, which Opacus's hooks do not see; pass its input by position"


def _one_tensor(layer: _Layer) -> str | None:
    """Opacus's vmap sampler passes one input and one output gradient."""
    from opacus.grad_sample import GradSampleModule

    if type(layer.module) in GradSampleModule.GRAD_SAMPLERS:
        return None
    for call in layer.calls:
        if len(call.inputs) > 1 or len(call.outputs) > 1:
            counts = f"takes {len(call.inputs)} tensors and returns {len(call.outputs)}"
            return f"{counts}, but Opacus's vmap sampler handles one of each; build it of layers with one of each"
    return None


def _called_again(layer: _Layer) -> str | None:
    """Opacus's ghost clipping adds norms where gradients should be added."""
    if len(layer.calls) > 1:
        return f"called {len(layer.calls)} times in a forward pass, which Opacus takes for parameter tying; use ghost"
    return None


def _tied(layer: _Layer) -> str | None:
    """Opacus's ghost clipping refuses tied parameters in its first step."""
    if layer.tied:
        return f"shares a parameter with {layer.tied[0].name}; use ghost"
    return None


def _flat_indices(layer: _Layer) -> str | None:
    """ExpandedWeights takes indices (N,) for an input without a batch."""
    if isinstance(layer.module, nn.Embedding) and any(len(call.inputs[0]) < 2 for call in layer.calls):
        return "indices of shape (N,), but ExpandedWeights needs two dimensions; look up y[:, None], or use opacus"
    return None


_HOOKED = ("opacus", "opacus-functorch", "opacus-ghost")
_HOOKS: tuple[Check, ...] = (_by_keyword, _one_tensor, _first_dimension, _unused, _read_outside)
_REUSE: tuple[Check, ...] = (_called_again, _tied)
_WATCHED: tuple[Check, ...] = (_layers_own(_first_dimension), _layers_own(_read_outside))
CHECKS: dict[str, tuple[Check, ...]] = {
    "vanilla": (_first_dimension,),
    "microbatch": (),
    "opacus": _HOOKS,
    "opacus-functorch": _HOOKS,
    "opacus-ew": (_flat_indices, _first_dimension, _unused),
    "opacus-ghost": (*_REUSE, *_HOOKS),
}
"""What a forward pass can reveal against a method, where that is not what it reveals against layers under watch."""


def _checks(method: str, layer: _Layer, probe: Probe) -> tuple[Check, ...]:
    """Return what can be checked: without a probe ties alone; reuse alone where Opacus's vmap takes an ancestor."""
    checks = CHECKS.get(method, _WATCHED)
    if probe.failure is not None:
        return tuple(check for check in checks if check is _tied)
    hidden = layer.inside is not None and method in _HOOKED
    return tuple(check for check in checks if check in _REUSE) if hidden else checks


# --- layers -------------------------------------------------------------------------------------------------------


def trains(module: nn.Module) -> bool:
    """Return whether a module has trainable parameters of its own."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _layers(model: nn.Module, probe: Probe) -> list[_Layer]:
    """Return the layers a private method must handle: those that train, and those that mix examples."""
    chosen = {name: m for name, m in model.named_modules() if trains(m) or isinstance(m, COUPLED)}
    used = {parameter for name, parameter in model.named_parameters() if name in probe.used}
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in chosen.items():
        for parameter in dict.fromkeys(module.parameters(recurse=False)):
            holders.setdefault(parameter, []).append(name)
    layers = {}
    for name, module in chosen.items():
        own = {key: parameter for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}
        layers[name] = _Layer(
            name=name or "(root)",
            module=module,
            calls=probe.calls.get(name, ()),
            num_examples=probe.num_examples,
            unused=tuple(key for key, parameter in own.items() if parameter not in used),
            inside=_taken_whole(model, name),
        )
    for name, layer in layers.items():
        others = dict.fromkeys(other for p in layer.module.parameters(recurse=False) for other in holders[p])
        layers[name] = replace(layer, tied=tuple(layers[other] for other in others if other != name))
    return list(layers.values())


def _taken_whole(model: nn.Module, name: str) -> str | None:
    """Return the outermost ancestor that Opacus handles by vmap, children and all; imports opacus."""
    from opacus.grad_sample import GradSampleModule

    parts = name.split(".") if name else []
    for length in range(len(parts)):
        path = ".".join(parts[:length])
        ancestor = model.get_submodule(path)
        if trains(ancestor) and type(ancestor) not in GradSampleModule.GRAD_SAMPLERS:
            return path or "(root)"
    return None
