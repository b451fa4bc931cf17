"""What an inspection finds, as plain data. No torch."""

from dataclasses import dataclass

SCHEMA_VERSION = 1

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module in the probe: shapes of the tensors that went in and came out.

    Attributes:
        inputs: Positional tensors first, then keyword ones.
        outputs: As returned, containers flattened.
        positional: How many of `inputs` were positional.
    """

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    positional: int


@dataclass(frozen=True, kw_only=True)
class ParameterFacts:
    """One parameter of a module's own."""

    name: str
    shape: Shape
    trainable: bool


@dataclass(frozen=True, kw_only=True)
class ModuleFacts:
    """One module.

    Attributes:
        name: Path from the root, which is ``""``.
        type: Its class.
        parameters: Its own, without its children's.
        num_parameters: Elements of those, a tied one counted where it appears first.
        calls: What the probe saw; empty if there was none or the module was not called.
    """

    name: str
    type: str
    parameters: tuple[ParameterFacts, ...]
    num_parameters: int
    calls: tuple[Call, ...]


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """Trainable parameters of all layers of one type; `share` is of the trainable total, 0 to 1."""

    type: str
    layers: int
    parameters: int
    share: float


@dataclass(frozen=True, kw_only=True)
class RuleUse:
    """Layers of one type that a method treats alike.

    Attributes:
        type: The layers' class.
        rule: ghost, direct, outer product, embedding, broadcast, functorch, expanded weights; ``by shape`` where the
            shapes decide and are unknown; ``none`` where the method cannot run.
        reason: Why this rule, or what is wrong.
        fix: The nearest way out, for ``none``; else empty.
        layers: Their names.
    """

    type: str
    rule: str
    reason: str
    fix: str
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MethodVerdict:
    """Whether a method can run on the model.

    Attributes:
        method: Key of `METHODS`.
        peer: Whether it is somebody else's implementation.
        supported: Whether no layer stands in the way, as far as a probe can tell.
        refusal: What the method says when attached, if it refuses for a reason that is no single layer's.
        rules: How it treats each trainable layer; empty for a method without clipping, which needs no norms.
    """

    method: str
    peer: bool
    supported: bool
    refusal: str | None
    rules: tuple[RuleUse, ...]


@dataclass(frozen=True, kw_only=True)
class ValidatorError:
    """One complaint of Opacus's `ModuleValidator`; `layer` is empty where it is about the whole model."""

    layer: str
    type: str
    message: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Derived sizes of a model: the input is `latent_size` positions a side, the blocks see `num_tokens` tokens."""

    image_size: int
    in_channels: int
    latent_size: int
    patch_size: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything `memory-test inspect` says; the JSON document is this, field by field.

    Attributes:
        schema_version: Of this document.
        model: As asked for, with the sizes that differ from the named model's.
        sizes: `None` for a model of the user's own.
        total_parameters: Tied ones counted once; so are the next.
        trainable_parameters: Those that take gradients.
        parameter_bytes_float32: Bytes of all parameters at 4 bytes each.
        frozen: Names of the parameters that do not train.
        num_examples: N of the probe, `None` where its inputs do not agree on a first dimension.
        shapes_unknown: Why there are no shapes, or `None` if the probe ran.
        modules: Every module, parents before children.
        layer_types: By size, largest first.
        methods: In the registry's order.
        validator_errors: Empty if `ModuleValidator` accepts the model.
    """

    schema_version: int = SCHEMA_VERSION
    model: str
    sizes: Sizes | None
    total_parameters: int
    trainable_parameters: int
    parameter_bytes_float32: int
    frozen: tuple[str, ...]
    num_examples: int | None
    shapes_unknown: str | None
    modules: tuple[ModuleFacts, ...]
    layer_types: tuple[LayerType, ...]
    methods: tuple[MethodVerdict, ...]
    validator_errors: tuple[ValidatorError, ...]
