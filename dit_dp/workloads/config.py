"""Which workload, at which sizes: what a user chooses, and what follows from it. No torch."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.registry import parse_model_name
from dit_dp.objectives.config import ObjectiveConfig, shift_for
from dit_dp.training.schedule import Schedule
from dit_dp.workloads.registry import DIT_SIZES, WORKLOADS, Workload

_NAME = re.compile(r"([A-Za-z]+(?:-[A-Z]+)?)(?:/(\d+))?")
_SIZES = {"hidden_size": "width", "depth": "depth", "num_heads": "heads"}
"""Fields that may differ from the named model's, and the word for each."""

_CHANNELS = {1: "1 (grey pixels)", 3: "3 (RGB pixels)", 4: "4 (VAE latents)"}

_DERIVED = ("set_size", "context_shape", "learn_sigma", "class_dropout_prob")
"""Fields of an objective that follow from the model."""


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What a user chooses of a workload; `None` is the workload's own value."""

    workload: str = "dit"
    """dit, diffusers, x2, set, ddt or panda."""
    model: str | None = None
    """Name of the model's size, with its patch size: DiT-XL/2, DDT-S, Set/2, Panda/4; for diffusers a hub name or a
    local folder."""
    image_size: int | None = None
    """Side of the image in pixels."""
    patch_size: int | None = None
    """Side of a patch."""
    in_channels: int | None = None
    """Channels of the model's input: 1 or 3 for pixels, 4 for VAE latents, 768 for RAE latents."""
    latent_downsample: int | None = None
    """Pixels per input position."""
    hidden_size: int | None = None
    """Width, if not the named model's."""
    depth: int | None = None
    """Number of blocks, if not the named model's."""
    num_heads: int | None = None
    """Attention heads, if not the named model's."""
    num_classes: int | None = None
    """Number of labels, without the null label."""
    class_dropout_prob: float | None = None
    """Probability that a unit's label is dropped."""
    learn_sigma: bool | None = None
    """Predict variances too."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    model_options: tuple[str, ...] = ()
    """More of the model's arguments, each NAME=VALUE: x2_fuse_every=1, conditioning=lag, hidden_size=[384,384]."""
    objective: tuple[str, ...] = ()
    """Of the objective, each NAME=VALUE: path=additive, multiplicity=4."""
    train: str | None = None
    """What trains: full, x2, encoder_then_full(N), attention, bias_norm, adaln, lora(R) or head; or phases, each
    GROUPS:START-END: encoder:1-5000,encoder+head:5001-9000,full:9001-."""

    def __post_init__(self) -> None:
        """Check every field, alone and together."""
        validate.one_of("workload", self.workload, WORKLOADS)
        self.spec  # noqa: B018  # raises on what does not fit

    @property
    def spec(self) -> "WorkloadSpec":
        """All that follows from the choices.

        Raises:
            UsageError: A value that is not accepted, or that does not fit the others.
        """
        return _Resolver(self).spec()


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """A workload with every value said.

    Attributes:
        name: Key of `WORKLOADS`.
        model: Name of the model with its patch size.
        arguments: Of the model's class.
        objective: What it is trained on.
        train: What trains when: a preset, or phases, as `Schedule.parse` reads them.
        image_size: Side of the image in pixels.
        latent_downsample: Pixels per input position.
        latent_size: H = W, side of the model's input.
        in_channels: C.
        patch_size: p; `None`: the checkpoint's.
        num_classes: Number of labels; `None`: none.
        num_tokens: T; `None` where the checkpoint says it.
    """

    name: str
    model: str
    arguments: Mapping[str, Any]
    objective: ObjectiveConfig
    train: str
    image_size: int
    latent_downsample: int
    latent_size: int
    in_channels: int
    patch_size: int | None
    num_classes: int | None
    num_tokens: int | None

    @property
    def workload(self) -> Workload:
        """The workload that this is one of."""
        return WORKLOADS[self.name]

    @property
    def label(self) -> str:
        """The model for people: ``DiT-S/2 (depth 4)``; with the workload where another one has this name too."""
        size = self.model.partition("/")[0]
        named = self.workload.sizes.get(size, {})
        owner = next((name for name, other in WORKLOADS.items() if size in other.sizes), self.name)
        changes = [
            f"{word} {_spoken(self.arguments[name])}"
            for name, word in _SIZES.items()
            if name in named and _spoken(self.arguments[name]) != _spoken(named[name])
        ]
        label = self.model if owner == self.name else f"{self.name} {self.model}"
        return f"{label} ({', '.join(changes)})" if changes else label

    @property
    def schedule(self) -> Schedule:
        """What trains when."""
        return Schedule.parse(self.train)

    @property
    def in_latents(self) -> bool:
        """Whether the model's input is a front-end's latents, not pixels."""
        return self.latent_downsample > 1


class _Resolver:
    """Goes from choices to values, one question a method."""

    def __init__(self, config: WorkloadConfig) -> None:
        self.config, self.workload = config, WORKLOADS[config.workload]
        self.options = _parsed("model_options", config.model_options)
        self.overrides = _parsed("objective", config.objective)

    def spec(self) -> WorkloadSpec:
        config, own = self.config, self.workload
        for name in ("image_size", "in_channels", "latent_downsample", "patch_size"):
            if getattr(config, name) is not None:
                validate.integer(name, getattr(config, name))
        size, patch = self._name()
        image_size = self._chosen("image_size")
        channels = self._chosen("in_channels")
        self._check_channels(channels)
        downsample = config.latent_downsample or own.downsample.get(channels, 1)
        fix = f"one input position covers {downsample} pixels (latent_downsample)"
        validate.divisible("image_size", image_size, downsample, fix)
        latent_size = image_size // downsample
        if patch is not None:
            fix = f"the input is {latent_size} positions wide and patch_size is {patch}"
            validate.divisible("image_size", image_size, downsample * patch, fix)
        num_classes = self._num_classes()
        arguments = self._arguments(size)
        self._check_widths(arguments)
        train = config.train or own.train
        Schedule.parse(train)
        dropout, learn_sigma = self._dropout(), self._learn_sigma()
        label = f"{size}/{patch}" if own.sizes else str(size)
        if own.family == "diffusers":
            arguments |= {"model_name": size, "pretrained": True, "img_size": image_size}
            arguments |= {"latent_downsample": downsample, "patch_size": patch, "learn_sigma": learn_sigma}
        else:
            arguments |= {"input_size": latent_size, "patch_size": patch}
        if own.family in ("dit", "x2"):
            arguments["learn_sigma"] = learn_sigma
        if num_classes is not None:
            arguments["num_classes"] = num_classes
        if dropout is not None:
            arguments["class_dropout_prob"] = dropout
        arguments |= {"in_channels": channels, "activation_checkpointing": config.activation_checkpointing}
        return WorkloadSpec(
            name=config.workload,
            model=label,
            arguments=arguments,
            objective=self._objective(arguments, dropout=dropout, learn_sigma=learn_sigma),
            train=train,
            image_size=image_size,
            latent_downsample=downsample,
            latent_size=latent_size,
            in_channels=channels,
            patch_size=patch,
            num_classes=num_classes,
            num_tokens=None if patch is None else (latent_size // patch) ** 2,
        )

    def _chosen(self, name: str) -> Any:
        """Return a field's value, else the workload's."""
        value = getattr(self.config, name)
        return getattr(self.workload, name) if value is None else value

    def _name(self) -> tuple[str, int | None]:
        """Return the name of the model's size, and its patch size."""
        own, asked = self.workload, self._chosen("model")
        if not own.sizes:
            return asked, self.config.patch_size
        if own.sizes is DIT_SIZES:
            size, patch = parse_model_name(asked)
            return size, self.config.patch_size or patch or own.patch_size
        match = _NAME.fullmatch(asked)
        size, named_patch = match.groups() if match else (asked, None)
        if size not in own.sizes:
            accepted = [f"{name}/{own.patch_size}" for name in own.sizes]
            raise UsageError.for_value("model", asked, accepted, f"of the workload {self.config.workload}")
        return size, self.config.patch_size or int(named_patch or own.patch_size)

    def _check_channels(self, channels: int) -> None:
        """Refuse latents where pixels are expected, and channels that no input has."""
        own = self.workload
        accepted = sorted({*own.downsample, own.in_channels, 1, 3} if own.frontend else {1, 3})
        if own.family == "diffusers":
            accepted = [4]
        if own.family != "ddt" and channels not in accepted:
            fix = None if own.frontend else f"{self.config.workload} takes pixels only"
            if own.family == "diffusers":
                fix = "pretrained DiT takes 4-channel VAE latents; drop --pretrained"
            raise UsageError.for_value("in_channels", channels, [_CHANNELS[number] for number in accepted], fix)

    def _check_widths(self, arguments: Mapping[str, Any]) -> None:
        """Refuse widths that cannot be split over heads or given positions; for pairs, of each."""
        if self.workload.family in ("diffusers", "panda"):  # the checkpoint's, or each head as wide as a token
            return
        pairs = [arguments[name] for name in ("hidden_size", "num_heads")]
        widths, heads = (list(value) if isinstance(value, (tuple, list)) else [value] for value in pairs)
        for width, count in zip(widths, heads, strict=False):
            validate.divisible("hidden_size", width, count, f"it is split over {count} heads")
            validate.divisible("hidden_size", width, 4, "the 2-D sin-cos positions need a multiple of 4")

    def _num_classes(self) -> int | None:
        own, asked = self.workload, self.config.num_classes
        if asked is not None:
            validate.integer("num_classes", asked)
            if own.num_classes is None:
                raise UsageError.for_value("num_classes", asked, "no value", f"{self.config.workload} takes no labels")
        return own.num_classes if asked is None else asked

    def _dropout(self) -> float | None:
        """Return the probability that a label is dropped, or `None` where there is no null label."""
        own, asked = self.workload.objective.class_dropout_prob, self.config.class_dropout_prob
        if asked is not None and own is None:
            fix = f"{self.config.workload} has no null label"
            raise UsageError.for_value("class_dropout_prob", asked, "no value", fix)
        return own if asked is None else asked

    def _learn_sigma(self) -> bool:
        own, asked = self.workload.objective.learn_sigma, self.config.learn_sigma
        if asked and not own:
            fix = f"{self.config.workload} predicts no variances"
            raise UsageError.for_value("learn_sigma", asked, "False", fix)
        return own if asked is None else asked

    def _arguments(self, size: str) -> dict[str, Any]:
        """Return the model's sizes and further options."""
        own, config = self.workload, self.config
        arguments = {**own.sizes.get(size, {}), **own.options}
        sizes = {name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads")}
        for name, value in sizes.items():
            if value is None:
                continue
            if not own.sizes:
                raise UsageError.for_value(name, value, "None", "the checkpoint says it")
            validate.integer(name, value)
            if isinstance(arguments[name], (tuple, list)):
                fix = f"encoder and decoder have one each: model_options {name}=[{value},{value}]"
                raise UsageError.for_value(name, value, "no value", fix)
            arguments[name] = value
        for name, value in self.options.items():
            if name not in arguments:
                raise UsageError.for_value("model_options", name, arguments or "none", f"of {config.workload}")
            arguments[name] = _like(name, value, arguments[name])
        return arguments

    def _objective(self, arguments: Mapping[str, Any], *, dropout: float | None, learn_sigma: bool) -> ObjectiveConfig:
        """Return the workload's objective with what was asked for, in agreement with the model."""
        own = self.workload.objective
        known = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        for name, value in self.overrides.items():
            if name not in known or name in _DERIVED:
                accepted = [other for other in known if other not in _DERIVED]
                raise UsageError.for_value("objective", name, accepted)
            known[name] = _like(name, value, known[name])
        known |= {"class_dropout_prob": dropout, "learn_sigma": learn_sigma}
        if self.workload.shifts_by_size and "shift" not in self.overrides:
            known["shift"] = shift_for(arguments["in_channels"] * arguments["input_size"] ** 2)
        if self.workload.unit == "set":
            known["set_size"] = arguments["sample_size"]
            known["context_shape"] = _context_shape(arguments)
        return ObjectiveConfig(**known)


def _context_shape(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the noise that a variational set model samples a context with."""
    if not arguments["variational"]:
        return None
    width = arguments["hidden_size"]
    tokens = (arguments["input_size"] // arguments["patch_size"]) ** 2
    return (width,) if arguments["conditioning"] == "film" else (tokens, width)


def _spoken(value: Any) -> str:
    """Return a size for people; of two streams, both."""
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _parsed(field: str, items: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of NAME=VALUE items, written as in YAML."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UsageError.for_value(field, item, "NAME=VALUE")
        if name in values:
            raise UsageError.for_value(field, item, f"each name once, and {name} was said before")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError.for_value(field, item, "NAME=VALUE with a value as in YAML") from error
    return values


def _like(name: str, value: Any, default: Any) -> Any:
    """Return a value of the same type as the default, or raise `UsageError`."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list) and all(type(v) is type(default[0]) for v in value):
        return tuple(value)
    if default is None or (value is None and name in ("x2_width", "encoder_depth")) or type(value) is type(default):
        return value
    raise UsageError.for_value(name, value, f"a value such as {default}")
