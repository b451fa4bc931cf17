"""What an objective is made of, as plain data. No torch, so that a command line can validate against it."""

from dataclasses import dataclass
from typing import Literal

from dit_dp import validate
from dit_dp.errors import UsageError

PathName = Literal["ddpm-linear", "ddpm-cosine", "flow", "additive"]
TargetName = Literal["eps", "v", "x0"]
MetricName = Literal["l2", "l1"]
TimesName = Literal["uniform", "logit-normal"]

PATHS: tuple[PathName, ...] = ("ddpm-linear", "ddpm-cosine", "flow", "additive")
TARGETS: tuple[TargetName, ...] = ("eps", "v", "x0")
METRICS: tuple[MetricName, ...] = ("l2", "l1")
TIMES: tuple[TimesName, ...] = ("uniform", "logit-normal")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Path x target x metric x distribution of times, and what a privacy unit is.

    Attributes:
        path: ``ddpm-linear``, ``ddpm-cosine``: ``x_t = sqrt(abar) x0 + sqrt(1 - abar) eps`` at steps 0 ... S - 1;
            ``flow``: ``x_t = (1 - t) x0 + t eps``; ``additive``: ``x_t = x0 + t eps``; t from 0 to 1.
        target: ``eps``, ``x0``, or ``v``, the path's velocity: ``sqrt(abar) eps - sqrt(1 - abar) x0``, ``eps - x0``,
            ``eps``.
        metric: Mean squared (``l2``) or absolute (``l1``) error.
        learn_sigma: The model also predicts variances (2C channels), trained by the variational bound; DDPM only.
        kl_weight: Factor on the KL divergence of models that return one.
        num_steps: S; of linear betas, which end at 20 / S, more than 20.
        times: ``uniform``, or ``logit-normal``: the sigmoid of a normal of `logit_mean` and `logit_std`.
        shift: s; times become ``s t / (1 + (s - 1) t)``.
        time_scale: The model is told this times t; `None`: 1000 on the additive path, else 1.
        class_dropout_prob: Probability that a unit's label is dropped; `None`: the model has no null label, and no
            mask is drawn.
        multiplicity: K, draws of time and noise for each unit, whose losses are averaged (arXiv 2302.13861).
        set_size: M, images of a set; the unit is the set then, else the image.
        context_shape: Of the noise, for each image, that a variational set model samples its context with.

    Raises:
        UsageError: A value that is not accepted, or that its path has no use for.
    """

    path: PathName = "ddpm-linear"
    target: TargetName = "eps"
    metric: MetricName = "l2"
    learn_sigma: bool = False
    kl_weight: float = 1.0
    num_steps: int = 1000
    times: TimesName = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    time_scale: float | None = None
    class_dropout_prob: float | None = 0.1
    multiplicity: int = 1
    set_size: int | None = None
    context_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        validate.one_of("path", self.path, PATHS)
        validate.one_of("target", self.target, TARGETS)
        validate.one_of("metric", self.metric, METRICS)
        validate.one_of("times", self.times, TIMES)
        validate.integer("num_steps", self.num_steps, minimum=21 if self.path == "ddpm-linear" else 2)
        validate.integer("multiplicity", self.multiplicity)
        validate.real("kl_weight", self.kl_weight, positive=False)
        validate.real("logit_std", self.logit_std, positive=True)
        validate.real("shift", self.shift, positive=True)
        if self.time_scale is not None:
            validate.real("time_scale", self.time_scale, positive=True)
        if self.set_size is not None:
            validate.integer("set_size", self.set_size, minimum=2)
        dropout = self.class_dropout_prob
        if dropout is not None and not 0 <= dropout <= 1:
            raise UsageError.for_value("class_dropout_prob", dropout, "a probability, 0 to 1, or None")
        if self.learn_sigma and not self.is_ddpm:
            raise UsageError.for_value("learn_sigma", True, "False", f"path={self.path!r} has no variational bound")
        if self.context_shape is not None and self.set_size is None:
            raise UsageError.for_value("context_shape", self.context_shape, "None", "only models of sets have one")

    @property
    def is_ddpm(self) -> bool:
        """Whether times are steps 0 ... S - 1."""
        return self.path.startswith("ddpm")

    @property
    def rows_per_unit(self) -> int:
        """Rows of a batch that one unit has: K x M."""
        return self.multiplicity * (self.set_size or 1)

    @property
    def scale_of_times(self) -> float:
        """What times are multiplied by before the model is told."""
        default = 1000.0 if self.path == "additive" else 1.0
        return default if self.time_scale is None else self.time_scale


def shift_for(num_dimensions: int, base: int = 4096) -> float:
    """Return the shift for data of so many dimensions, ``sqrt(num_dimensions / base)`` (arXiv 2403.03206; RAE)."""
    return float((num_dimensions / base) ** 0.5)
