"""A training run as plain data: what is trained, on what, under which budget. No torch.

The same class makes the command line and the recipes (YAML).
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.workloads.config import WorkloadConfig

BUNDLED = ("digits", "mnist", "synthetic")
"""Data that needs no folder."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(WorkloadConfig):
    """Train a workload under a privacy budget.

    --recipe NAME|FILE takes the values of a recipe; options after it win. None is the workload's own value, or what
    follows from the rest.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012

    # --- data
    data: Annotated[str | None, tyro.conf.arg(aliases=["--data-path"])] = None
    """digits, mnist, synthetic, or an ImageNet-style folder with one folder for each class. Always said."""
    classes: tuple[int, ...] | None = None
    """Labels to keep of a folder; the others' label ids stay as they are."""
    skip_corrupt: bool = False
    """Leave out images of a folder that cannot be read."""
    held_out: float = 0.0
    """Fraction of the images kept apart, by their content, for a validation loss; 0: none."""
    set_remainder: Literal["refuse", "drop"] = "refuse"
    """Of a class whose number of training images the size of a set does not divide: refuse, or drop what is over."""
    num_synthetic: int = 1024
    """Examples of synthetic data."""
    frontend: str | None = None
    """Frozen encoder from pixels to latents, a local folder or a hub name: a VAE, or a RAE for ddt."""
    frontend_statistics: str | None = None
    """Of a RAE's latents: a safetensors file of public data, none, or what the front-end comes with."""
    latent_cache: Path | None = None
    """Folder of encoded data; default: next to the run's."""
    weights: Path | None = None
    """Weights to start from: a published checkpoint (.pt, .safetensors), or a run's checkpoint folder."""
    weights_are_public: bool = False
    """Of weights from a run's checkpoint: say that what trained them was public, so that epsilon need not cover it."""
    # --- privacy
    epsilon: float | None = None
    """Budget; the noise multiplier follows from it, and training stops before the step that would exceed it."""
    delta: float = 1e-5
    """Of the budget."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise over C, in place of a budget; 0: no privacy."""
    max_grad_norm: float = 1.0
    """Clipping threshold C."""
    sampling: Literal["poisson", "shuffled"] = "poisson"
    """How batches are drawn: each unit by itself with the same probability, or fixed batches, of which no epsilon is
    claimed."""
    # --- optimisation
    batch_size: int = 256
    """Units in a logical batch, expected, of all devices together."""
    physical_batch_size: int | None = None
    """Largest number of units in a physical batch on a device; default: as the method plans, or the logical batch."""
    steps: int | None = None
    """Steps to take; or say epochs."""
    epochs: float | None = None
    """Expected passes over the data."""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "auto"
    """How gradients are clipped. auto: the fastest within the memory budget; on shards, ghost_fsdp_bk."""
    memory_budget_gib: float | None = None
    """Peak memory that the method may plan for."""
    optimizer: Literal["adamw", "adam", "sgd"] | None = None
    """Optimizer."""
    learning_rate: float | None = None
    """Step size, after the warmup."""
    betas: tuple[float, float] | None = None
    """Of adamw and adam."""
    momentum: float = 0.0
    """Of sgd."""
    weight_decay: float = 0.0
    """Of the optimizer."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From the end of the warmup to the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    final_learning_rate: float = 0.0
    """At the last step of linear and cosine."""
    ema_decay: float | None = None
    """Of the average that is sampled from; 0: none."""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16: autocast, parameters stay float32."""
    compile: bool = False
    """torch.compile the model."""
    # --- run
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA if there is one."""
    devices: int = 1
    """Processes on this machine, one a device; started by torchrun."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """What several devices share: units alone, or parameters too."""
    init_seed: int = 0
    """Of the initial weights."""
    insecure_seed: int | None = None
    """Seed of sampling and noise, for tests: whoever knows it can undo the noise, so no privacy is claimed."""
    output_dir: Path = Path("results")
    """Folder of the runs."""
    resume: str | None = None
    """auto: go on with the newest run of this model, if there is one; or the folder of a run."""
    any_world_size: bool = False
    """Let a run go on with another number of processes; of fixed batches it never may."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, of which the last is always one; default: a tenth of all steps, 10 to 1000."""
    keep_checkpoints: int = 2
    """How many are kept."""
    full_checkpoints: bool = False
    """Keep frozen parameters in checkpoints too."""
    log_every: int = 100
    """Steps between lines of the log."""
    validate_every: int | None = None
    """Steps between validation losses on what was held out; default: log_every; 0: never."""
    sample_every: int | None = None
    """Steps between sample grids; default: at the last step."""
    num_samples: int = 16
    """Images of a grid; 0: no grids."""
    cfg_scale: float = 1.0
    """Guidance of the grids' samples."""
    tracker: Literal["tensorboard", "wandb", "none"] = "none"
    """Where scalars, histograms and grids go besides log.txt."""
    dry_run: bool = False
    """Print noise multiplier, steps, epsilon, method and batch; train nothing."""

    def __post_init__(self) -> None:
        """Check every field, alone and together."""
        super().__post_init__()
        if self.method == "auto" and self.sharding == "fsdp2":
            if self.memory_budget_gib is not None:
                fix = "on shards no method plans its memory"
                raise UsageError.for_value("memory_budget_gib", self.memory_budget_gib, "None", fix)
            object.__setattr__(self, "method", "ghost_fsdp_bk")
        for name in ("batch_size", "devices", "keep_checkpoints", "log_every", "num_synthetic"):
            validate.integer(name, getattr(self, name))
        for name in ("warmup_steps", "init_seed", "num_samples", "validate_every"):
            if getattr(self, name) is not None:
                validate.integer(name, getattr(self, name), minimum=0)
        for name in ("physical_batch_size", "steps", "checkpoint_every", "sample_every"):
            if getattr(self, name) is not None:
                validate.integer(name, getattr(self, name))
        if self.insecure_seed is not None:
            validate.integer("insecure_seed", self.insecure_seed, minimum=0)
        for name in ("epochs", "memory_budget_gib", "learning_rate", "epsilon"):
            if getattr(self, name) is not None:
                validate.real(name, getattr(self, name), positive=True)
        for name in ("max_grad_norm", "delta"):
            validate.real(name, getattr(self, name), positive=True)
        for name in ("momentum", "weight_decay", "final_learning_rate", "cfg_scale", "held_out"):
            validate.real(name, getattr(self, name), positive=False)
        self._check_choices()
        self._check_budget()
        self._check_run()

    def _check_choices(self) -> None:
        hints = get_type_hints(TrainConfig)
        validate.one_of("method", self.method, METHODS)
        for name in ("set_remainder", "sampling", "lr_schedule", "dtype", "device", "sharding", "tracker"):
            validate.one_of(name, getattr(self, name), get_args(hints[name]))
        if self.optimizer is not None:
            validate.one_of("optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UsageError.for_value("ema_decay", self.ema_decay, "a number >= 0 and < 1")
        if self.held_out >= 1:
            raise UsageError.for_value("held_out", self.held_out, "a fraction >= 0 and < 1")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError.for_value("betas", self.betas, "two numbers >= 0 and < 1")
        if self.memory_budget_gib is not None and not METHODS[self.method].takes_memory_budget:
            takers = [name for name, method in METHODS.items() if method.takes_memory_budget]
            raise UsageError.for_value(
                "memory_budget_gib", self.memory_budget_gib, "None", f"with {self.method}; {takers}"
            )
        if self.data is None:
            raise UsageError.for_value("data", None, [*BUNDLED, "a folder of images"])
        if self.data in BUNDLED and (self.classes is not None or self.skip_corrupt):
            raise UsageError.for_value(
                "data", self.data, "a folder of images", "classes and skip_corrupt are of folders"
            )

    def _check_budget(self) -> None:
        private = METHODS[self.method].private
        if self.delta >= 1:
            raise UsageError.for_value("delta", self.delta, "a number > 0 and < 1")
        if self.noise_multiplier is not None:
            validate.real("noise_multiplier", self.noise_multiplier, positive=False)
            if self.epsilon is not None and self.noise_multiplier == 0:
                raise UsageError.for_value("noise_multiplier", 0, "a number > 0", "a budget needs noise")
        if private and self.epsilon is None and self.noise_multiplier is None:
            fix = f"or noise_multiplier, or method=vanilla; {self.method} is private"
            raise UsageError.for_value("epsilon", None, "a budget such as 8", fix)
        if not private and (self.epsilon is not None or self.noise_multiplier):
            name = "epsilon" if self.epsilon is not None else "noise_multiplier"
            raise UsageError.for_value(name, getattr(self, name), "no value", f"{self.method} has no privacy")
        if self.sampling == "shuffled" and self.epsilon is not None:
            fix = "or sampling=poisson: no epsilon is claimed of fixed batches"
            raise UsageError.for_value("epsilon", self.epsilon, "no value, but a noise_multiplier", fix)
        if (self.steps is None) == (self.epochs is None):
            raise UsageError.for_value("steps", self.steps, "a number of steps, or epochs, one of both")

    def _check_run(self) -> None:
        if self.compile and not METHODS[self.method].supports_compile:
            raise UsageError.for_value("compile", True, "False", f"with {self.method}")
        if self.any_world_size and self.sampling == "shuffled":
            fix = "fixed batches are dealt out to the processes: other ones make another run"
            raise UsageError.for_value("any_world_size", True, "False", fix)
        if self.sharding == "fsdp2" and not METHODS[self.method].sharded:
            names = [name for name, method in METHODS.items() if method.sharded]
            raise UsageError.for_value("sharding", self.sharding, "ddp", f"or a method that runs on shards: {names}")
        if self.weights_are_public and self.weights is None:
            raise UsageError.for_value("weights_are_public", True, "False", "there are no weights to say it of")
        if self.frontend is None and self.frontend_statistics is not None:
            raise UsageError.for_value("frontend_statistics", self.frontend_statistics, "None", "there is no frontend")
        if self.frontend is not None and self.spec.workload.frontend is None:
            raise UsageError.for_value("frontend", self.frontend, "no value", f"{self.workload} takes pixels")

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise from a source that nobody knows."""
        return METHODS[self.method].private and self.noise_multiplier != 0 and self.insecure_seed is None

    def chosen(self, name: str) -> Any:
        """Return a field's value, or the workload's own if it is `None`: optimizer, learning_rate, betas, ema_decay."""
        value = getattr(self, name)
        return getattr(self.spec.workload, name) if value is None else value

    def as_json(self) -> dict[str, Any]:
        """Return every field as JSON takes it."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


FIELDS = tuple(field.name for field in fields(TrainConfig))
"""Names of all fields."""
