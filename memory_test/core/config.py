"""What is measured: one frozen configuration, validated where it is made, resolved before it runs."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.models.registry import LATENT_DOWNSAMPLE, MODELS, parse_model_name

DECIDED = (
    "image_size",
    "patch_size",
    "in_channels",
    "latent_downsample",
    "hidden_size",
    "depth",
    "num_heads",
    "num_classes",
    "class_dropout_prob",
    "learn_sigma",
    "activation_checkpointing",
    "data",
)
"""Fields that a callable of the user's own decides: at their defaults when asked for, `None` when resolved."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One cell: a method, a model, a batch and how to measure them.

    The same class makes the command line, the YAML sweeps and the `config_requested` of a record.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012

    experiment: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")]
    """Method to measure."""
    model: str = "DiT-XL/2"
    """DiT-{S,B,L,XL}/{2,4,8}; with --pretrained a hub name or a local folder; or module:callable of your own,
    which returns (model, loss_fn, batch) with loss_fn(model, batch) one loss per example, or a model whose method
    make_batch(num_examples) returns (loss_fn, batch)."""
    pretrained: bool = False
    """Load diffusers' DiTTransformer2DModel and its weights from MODEL."""
    image_size: int = 256
    """Side of the image in pixels."""
    patch_size: int | None = None
    """Side of a patch; default: the one the model's name says."""
    in_channels: int = 4
    """4: VAE latents; 3: RGB pixels."""
    latent_downsample: int | None = None
    """Pixels per input position; default 8 with 4 channels, 1 with 3."""
    hidden_size: int | None = None
    """Width, if not the named model's."""
    depth: int | None = None
    """Number of blocks, if not the named model's."""
    num_heads: int | None = None
    """Attention heads, if not the named model's."""
    num_classes: int = 1000
    """Number of labels, without the null label."""
    class_dropout_prob: float = 0.1
    """Probability that an example's label is dropped."""
    learn_sigma: bool = True
    """Predict variances too (twice the output channels)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: bool = False
    """torch.compile the model (inductor); the first step's time includes compilation."""
    data: Literal["synthetic", "digits"] = "synthetic"
    """Standard normal inputs, or scikit-learn's digits resized (3 channels)."""
    batch_size: int = 1
    """Examples in a physical batch; a fixed batch of your own is cut or repeated to as many rows."""
    accumulation: int = 1
    """Physical batches per step: their clipped sums are added up before noise and update."""
    num_iter: int = 3
    """Timed steps."""
    warmup: int = 1
    """Untimed steps between the first step and the timed ones."""
    repeats: int = 1
    """Fresh processes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA if there is one."""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16: autocast, parameters stay float32."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer."""
    optimizer_impl: Literal["auto", "foreach", "fused", "for-loop"] = "auto"
    """auto: torch's own default, foreach on CUDA and for-loop on CPU."""
    learning_rate: float = 1e-4
    """Learning rate."""
    ema: bool = False
    """Keep a float32 moving average of what trains; counted as optimizer state."""
    max_grad_norm: float = 1.0
    """Clipping threshold C."""
    noise_multiplier: float = 1.0
    """Noise standard deviation over C; vanilla has none."""
    seed: int = 0
    """Seed of weights, data and noise: a measurement, never a release."""
    num_threads: int | None = None
    """CPU threads; default: the number of physical cores."""
    memory_limit_gib: float | None = None
    """CPU: memory the worker may take; default 85 % of what is free."""
    memory_budget_gib: float | None = None
    """Peak memory the method may plan for; only for methods that take a budget."""
    timeout_s: float = 3600.0
    """Longest time for one process."""

    def __post_init__(self) -> None:
        validate.one_of("experiment", self.experiment, METHODS)
        for name in ("image_size", "batch_size", "accumulation", "num_iter", "repeats", "num_classes"):
            validate.integer(name, getattr(self, name))
        validate.integer("warmup", self.warmup, minimum=0)
        validate.integer("seed", self.seed, minimum=0)
        for name in ("patch_size", "latent_downsample", "hidden_size", "depth", "num_heads", "num_threads"):
            if getattr(self, name) is not None:
                validate.integer(name, getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "timeout_s"):
            validate.real(name, getattr(self, name), positive=True)
        validate.real("noise_multiplier", self.noise_multiplier, positive=False)
        validate.real("class_dropout_prob", self.class_dropout_prob, positive=False)
        if self.class_dropout_prob > 1:
            raise UsageError.for_value("class_dropout_prob", self.class_dropout_prob, "a number from 0 to 1")
        for name in ("memory_limit_gib", "memory_budget_gib"):
            if getattr(self, name) is not None:
                validate.real(name, getattr(self, name), positive=True)
        for name in ("device", "dtype", "optimizer", "optimizer_impl", "data"):
            validate.one_of(name, getattr(self, name), get_args(_HINTS[name]))
        if self.is_custom:
            self._check_custom()
        else:
            self._check_shapes()
        self._check_combinations()

    def _check_custom(self) -> None:
        check_spec(self.model)
        for name in DECIDED:
            if getattr(self, name) != _DEFAULTS[name]:
                raise UsageError.for_value(
                    name, getattr(self, name), "no value", f"{self.model} decides it; drop the option"
                )

    def _check_shapes(self) -> None:
        if self.in_channels not in (3, 4):
            raise UsageError.for_value("in_channels", self.in_channels, "3 (RGB pixels), 4 (VAE latents)")
        downsample = self.resolved_latent_downsample
        validate.divisible(
            "image_size",
            self.image_size,
            downsample,
            f"one input position covers {downsample} pixels (latent_downsample)",
        )
        if self.pretrained:  # the checkpoint says which architecture it is; checked where it is loaded
            for name in ("hidden_size", "depth", "num_heads"):
                if getattr(self, name) is not None:
                    raise UsageError.for_value(name, getattr(self, name), "None", "the checkpoint says it")
            return
        patch = self.resolved_patch_size
        validate.divisible(
            "image_size",
            self.image_size,
            downsample * patch,
            f"the input is {self.latent_size} positions wide and patch_size is {patch}",
        )
        width, heads = self.resolved_size("hidden_size"), self.resolved_size("num_heads")
        validate.divisible("hidden_size", width, heads, f"it is split over {heads} heads")
        validate.divisible("hidden_size", width, 4, "the 2-D sin-cos positions need a multiple of 4")

    def _check_combinations(self) -> None:
        if self.pretrained and self.in_channels != 4:
            raise UsageError.for_value(
                "in_channels",
                self.in_channels,
                "4",
                "pretrained DiT takes 4-channel VAE latents; drop --pretrained",
            )
        if self.data == "digits" and self.in_channels != 3:
            raise UsageError.for_value(
                "data", self.data, "synthetic", "digits are pixels, so they need --in-channels 3"
            )
        if self.dtype == "bf16" and not METHODS[self.experiment].supports_autocast:
            raise UsageError.for_value(
                "dtype",
                self.dtype,
                "float32",
                f"{self.experiment} multiplies bf16 gradients by float32 weights; "
                f"methods that run in bf16: {_methods_with('supports_autocast')}",
            )
        if self.activation_checkpointing and not METHODS[self.experiment].supports_checkpointing:
            raise UsageError.for_value(
                "activation_checkpointing",
                True,
                "False",
                f"{self.experiment} keeps layer inputs by forward hooks, which run twice under it; "
                f"methods that support it: {_methods_with('supports_checkpointing')}",
            )
        if self.memory_budget_gib is not None and not METHODS[self.experiment].takes_memory_budget:
            raise UsageError.for_value("memory_budget_gib", self.memory_budget_gib, "None", no_budget(self.experiment))
        if self.compile and not METHODS[self.experiment].supports_compile:
            raise UsageError.for_value(
                "compile",
                True,
                "False",
                f"{self.experiment} swaps parameters for a subclass during each call, which a compiled model does not "
                f"see; methods that support it: {_methods_with('supports_compile')}",
            )

    @property
    def is_custom(self) -> bool:
        """Whether `model` is ``module:callable``, a model of the user's own."""
        return is_custom(self.model, self.pretrained)

    @property
    def resolved_latent_downsample(self) -> int:
        """Pixels per input position."""
        if self.latent_downsample is not None:
            return self.latent_downsample
        return LATENT_DOWNSAMPLE if self.in_channels == 4 else 1

    @property
    def latent_size(self) -> int:
        """Side of the model's input in positions."""
        return self.image_size // self.resolved_latent_downsample

    @property
    def resolved_patch_size(self) -> int:
        """Patch size asked for, else the model name's, else 2."""
        return self.patch_size or (None if self.pretrained else parse_model_name(self.model)[1]) or 2

    @property
    def model_label(self) -> str:
        """The model's name with its patch size, and what differs from the named sizes: ``DiT-S/2 (depth 4)``."""
        if self.pretrained or self.is_custom:
            return self.model
        named = MODELS[parse_model_name(self.model)[0]]
        changes = [
            f"{word} {getattr(self, name)}"
            for name, word in (("hidden_size", "width"), ("depth", "depth"), ("num_heads", "heads"))
            if getattr(self, name) not in (None, getattr(named, name))
        ]
        label = f"{parse_model_name(self.model)[0]}/{self.resolved_patch_size}"
        return f"{label} ({', '.join(changes)})" if changes else label

    def resolved_size(self, name: Literal["hidden_size", "depth", "num_heads"]) -> int:
        """Width, depth or number of heads: asked for, else the named model's."""
        asked: int | None = getattr(self, name)
        value: int = asked or getattr(MODELS[parse_model_name(self.model)[0]], name)
        return value

    def resolve(self, *, device: str, num_threads: int) -> dict[str, Any]:
        """Return the configuration with every default made explicit.

        Args:
            device: ``cuda`` or ``cpu``, what ``auto`` means on this machine.
            num_threads: CPU threads used when none were asked for.

        Returns:
            A JSON-ready mapping: every field, plus `latent_size` and `num_tokens` (T). The pretrained
            model's sizes are `None` here and known once it is loaded; so is all that a callable of the user's decides.
        """
        resolved = dataclasses.asdict(self)
        resolved.update(
            self._sizes(),
            device=device,
            num_threads=self.num_threads or num_threads,
            noise_multiplier=self.noise_multiplier if METHODS[self.experiment].private else 0.0,
        )
        if self.optimizer_impl == "auto":
            resolved["optimizer_impl"] = "foreach" if device == "cuda" else "for-loop"
        return resolved

    def _sizes(self) -> dict[str, Any]:
        """Return the model's part of the resolved configuration."""
        if self.is_custom:
            return dict.fromkeys((*DECIDED, "latent_size", "num_tokens"))
        patch = self.resolved_patch_size
        sizes: dict[str, Any] = {
            "patch_size": patch,
            "latent_downsample": self.resolved_latent_downsample,
            "latent_size": self.latent_size,
            "num_tokens": (self.latent_size // patch) ** 2,
        }
        if not self.pretrained:
            sizes["model"] = self.model_label
            for name in ("hidden_size", "depth", "num_heads"):
                sizes[name] = self.resolved_size(name)
        return sizes


def is_custom(model: str, pretrained: bool) -> bool:
    """Return whether a model is named as ``module:callable``."""
    return ":" in model and not pretrained


def check_spec(model: str) -> None:
    """Raise `UsageError` unless a name is ``module:callable`` in Python's words."""
    module, _, attribute = model.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise UsageError.for_value("model", model, "module:callable, such as my_package.models:make_model")


def no_budget(method: str) -> str:
    """Return why a method cannot be given a memory budget, and which methods can."""
    return f"{method} takes no memory budget; methods that do: {_methods_with('takes_memory_budget')}"


def _methods_with(ability: str) -> str:
    """Return the names of the methods that have an ability, a field of `Method`."""
    return ", ".join(name for name, method in METHODS.items() if getattr(method, ability)) or "none"


_HINTS = get_type_hints(ExperimentConfig)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ExperimentConfig)}
