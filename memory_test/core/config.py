"""What is measured: one frozen configuration, validated where it is made, resolved before it runs."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.workloads.config import WorkloadSpec
from memory_test.core.model_args import OF_MODEL, ModelArgs

NUM_DIGITS = 10
"""Classes of scikit-learn's digits."""

DECIDED = (*(name for name in OF_MODEL if name != "pretrained"), "data")
"""Fields that a callable of the user's own decides: at their defaults when asked for, `None` when resolved."""

DERIVED = ("latent_size", "num_tokens", "unit", "rows_per_unit", "trained_groups")
"""What a resolved configuration says beside the fields; `None` for a model of the user's own."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(ModelArgs):
    """One cell: a method, a model, a batch and how to measure them.

    The same class makes the command line, the YAML sweeps and the `config_requested` of a record.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012

    experiment: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")]
    """Method to measure."""
    compile: bool = False
    """torch.compile the model (inductor); the first step's time includes compilation."""
    data: Literal["synthetic", "digits"] = "synthetic"
    """Standard normal inputs, or scikit-learn's digits resized (3 channels); sets are made of them."""
    batch_size: int = 1
    """Examples (privacy units: images, or sets) in a physical batch; a fixed batch of your own is cut or repeated to
    as many rows."""
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
        """Check every field, alone and together."""
        super().__post_init__()
        validate.one_of("experiment", self.experiment, METHODS)
        for name in ("batch_size", "accumulation", "num_iter", "repeats"):
            validate.integer(name, getattr(self, name))
        validate.integer("warmup", self.warmup, minimum=0)
        validate.integer("seed", self.seed, minimum=0)
        if self.num_threads is not None:
            validate.integer("num_threads", self.num_threads)
        for name in ("learning_rate", "max_grad_norm", "timeout_s"):
            validate.real(name, getattr(self, name), positive=True)
        validate.real("noise_multiplier", self.noise_multiplier, positive=False)
        for name in ("memory_limit_gib", "memory_budget_gib"):
            if getattr(self, name) is not None:
                validate.real(name, getattr(self, name), positive=True)
        for name in ("device", "dtype", "optimizer", "optimizer_impl", "data"):
            validate.one_of(name, getattr(self, name), get_args(_HINTS[name]))
        if self.is_custom:
            assert self.model is not None
            self._refuse_given(["data"], self.model)
        else:
            self._check_workload(self.spec)
        self._check_method()

    def _check_workload(self, spec: WorkloadSpec) -> None:
        """Refuse data that the model cannot take, and a method that cannot take the workload's units."""
        if self.data == "digits":
            if spec.in_channels != 3:
                fix = "digits are pixels, so they need --in-channels 3"
                raise UsageError.for_value("data", self.data, "synthetic", fix)
            if spec.num_classes is not None and spec.num_classes < NUM_DIGITS:
                fix = "class ids of digits are 0 to 9"
                raise UsageError.for_value("num_classes", spec.num_classes, f">= {NUM_DIGITS} for digits", fix)
        rows = spec.objective.rows_per_unit
        if rows > 1 and METHODS[self.experiment].peer:
            ours = [name for name, method in METHODS.items() if not method.peer]
            fix = f"it takes every row for an example, and a unit here has {rows}"
            raise UsageError.for_value("experiment", self.experiment, ours, fix)

    def _check_method(self) -> None:
        """Refuse what the method cannot do."""
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
    def file_label(self) -> str:
        """The model's label in a file name."""
        name = Path(self.model_label).name if self.pretrained else self.model_label
        return "-".join(re.findall(r"[\w.]+", name))

    def as_dict(self) -> dict[str, Any]:
        """Return every field, as JSON holds it."""
        fields: dict[str, Any] = _listed(dataclasses.asdict(self))
        return fields

    def resolve(self, *, device: str, num_threads: int) -> dict[str, Any]:
        """Return the configuration with every default made explicit.

        Args:
            device: ``cuda`` or ``cpu``, what ``auto`` means on this machine.
            num_threads: CPU threads used when none were asked for.

        Returns:
            A JSON-ready mapping: every field, plus `DERIVED`: `latent_size`, `num_tokens` (T), `unit` (image or set),
            `rows_per_unit`, and `trained_groups`, the groups of parameters that train in step 1. `model_options` are
            all arguments of the model's class and `objective` all of the objective. The pretrained model's sizes are
            `None` here and known once it is loaded; so is all that a callable of the user's decides.
        """
        resolved = self.as_dict()
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
            return dict.fromkeys((*DECIDED, *DERIVED))
        spec = self.spec
        own = (
            "image_size",
            "patch_size",
            "in_channels",
            "latent_downsample",
            "latent_size",
            "num_tokens",
            "num_classes",
        )
        sizes: dict[str, Any] = {name: getattr(spec, name) for name in (*own, "train")}
        sizes |= {name: spec.arguments.get(name) for name in ("hidden_size", "depth", "num_heads")}
        sizes |= {
            name: getattr(spec.objective, name) for name in ("class_dropout_prob", "learn_sigma", "rows_per_unit")
        }
        sizes |= {"model": spec.label, "unit": spec.workload.unit, "trained_groups": spec.schedule.phases[0].groups}
        sizes |= {"model_options": dict(spec.arguments), "objective": dataclasses.asdict(spec.objective)}
        listed: dict[str, Any] = _listed(sizes)
        return listed


def _listed(value: Any) -> Any:
    """Return nested values with lists for tuples."""
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def experiment_of(args: ModelArgs, method: str = "vanilla", **changes: Any) -> ExperimentConfig:
    """Return the experiment with a method that other arguments describe: what they have in common with it.

    Raises:
        UsageError: The method cannot run so.
    """
    shared = {field.name for field in dataclasses.fields(args)} & {f.name for f in dataclasses.fields(ExperimentConfig)}
    given = {name: value for name in shared if (value := getattr(args, name)) is not None}
    return ExperimentConfig(**{**given, **changes, "experiment": method})


def no_budget(method: str) -> str:
    """Return why a method cannot be given a memory budget, and which methods can."""
    return f"{method} takes no memory budget; methods that do: {_methods_with('takes_memory_budget')}"


def _methods_with(ability: str) -> str:
    """Return the names of the methods that have an ability, a field of `Method`."""
    return ", ".join(name for name, method in METHODS.items() if getattr(method, ability)) or "none"


_HINTS = get_type_hints(ExperimentConfig)
