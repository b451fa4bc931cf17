"""How samples are drawn, as plain data. No torch, so that a command line can validate against it."""

from dataclasses import dataclass
from typing import Any, Literal

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.objectives.config import ObjectiveConfig
from dit_dp.workloads.config import WorkloadSpec

SamplerName = Literal["ancestral", "ddim", "euler"]
VarianceName = Literal["learned", "small", "large"]
GuideChannels = Literal["3", "all"]

SAMPLERS: tuple[SamplerName, ...] = ("ancestral", "ddim", "euler")
VARIANCES: tuple[VarianceName, ...] = ("learned", "small", "large")
GUIDE_CHANNELS: tuple[GuideChannels, ...] = ("3", "all")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampler, steps and guidance.

    Attributes:
        sampler: ``ancestral``: the reverse process of a DDPM (arXiv 2006.11239); ``ddim``: arXiv 2010.02502, on any
            path; ``euler``: along the velocity, on the ``flow`` and ``additive`` paths.
        num_steps: Model evaluations a sample. A DDPM is respaced: steps 0 ... S - 1 at equal distances, both ends
            among them; times of other paths go from 1 to 0 in equal steps, shifted as in training.
        eta: Of ``ddim``: 0 draws no noise after the start, 1 as much as the posterior has.
        variance: Of ``ancestral``: ``learned``, by a model that predicts variances; ``small``, the posterior's;
            ``large``, beta. `None`: learned if there are any, else small.
        cfg_scale: s of classifier-free guidance (arXiv 2207.12598), ``uncond + s (cond - uncond)``; 1: none, and the
            model runs once a step.
        guide_channels: Which channels of the prediction are guided: ``all``, as diffusers does; or ``3``, the first
            three, as the reference DiT's samples were made. Variances are those of the label in both.
        clamp: Clamp the predicted clean image to [-1, 1] at each step; for pixels, as latents have no such bounds.
        start_scale: Factor on the noise that samples start from. On the additive path data of variance v stand at
            time 1 with variance 1 + v, which ``(1 + v) ** 0.5`` matches.

    Raises:
        UsageError: A value that is not accepted.
    """

    sampler: SamplerName = "ancestral"
    num_steps: int = 250
    eta: float = 0.0
    variance: VarianceName | None = None
    cfg_scale: float = 1.0
    guide_channels: GuideChannels = "all"
    clamp: bool = False
    start_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        validate.one_of("sampler", self.sampler, SAMPLERS)
        validate.integer("steps", self.num_steps)
        validate.real("eta", self.eta, positive=False)
        if self.eta > 1:
            raise UsageError.for_value("eta", self.eta, "a number from 0 to 1")
        if self.eta and self.sampler != "ddim":
            raise UsageError.for_value("eta", self.eta, "0", "only sampler=ddim has an eta")
        if self.variance is not None:
            validate.one_of("variance", self.variance, VARIANCES)
            if self.sampler != "ancestral":
                raise UsageError.for_value("variance", self.variance, "None", "only sampler=ancestral has a variance")
        validate.real("cfg_scale", self.cfg_scale, positive=False)
        validate.one_of("guide_channels", self.guide_channels, GUIDE_CHANNELS)
        validate.real("start_scale", self.start_scale, positive=True)

    @classmethod
    def of(cls, spec: WorkloadSpec, **choices: Any) -> "SamplingConfig":
        """Return a workload's own way of sampling, with some choices made otherwise.

        Args:
            spec: Gives sampler and number of steps; pixels are clamped, latents are not.
            choices: Fields; `None` is the workload's own value.
        """
        own = spec.workload
        path = spec.objective.path
        sampler: SamplerName = own.sampler
        if own.sampler == "euler" and spec.objective.is_ddpm:
            sampler = "ancestral"
        elif own.sampler == "ancestral" and not spec.objective.is_ddpm:
            sampler = "euler"  # the objective was asked for with another path than the workload's
        steps = min(own.sampling_steps, spec.objective.num_steps) if path.startswith("ddpm") else own.sampling_steps
        known = {"sampler": sampler, "num_steps": steps, "clamp": not spec.in_latents}
        return cls(**{**known, **{name: value for name, value in choices.items() if value is not None}})

    def check(self, objective: ObjectiveConfig) -> None:
        """Raise `UsageError` on the first choice that a model of this objective has no use for."""
        if self.sampler == "ancestral" and not objective.is_ddpm:
            raise UsageError.for_value("sampler", self.sampler, "euler, ddim", f"path={objective.path!r} is no DDPM")
        if self.sampler == "euler" and objective.is_ddpm:
            fix = f"path={objective.path!r} has steps, not a velocity in time"
            raise UsageError.for_value("sampler", self.sampler, "ancestral, ddim", fix)
        if objective.is_ddpm and self.num_steps > objective.num_steps:
            raise UsageError.for_value("steps", self.num_steps, f"at most {objective.num_steps}, as it was trained on")
        if self.variance == "learned" and not objective.learn_sigma:
            raise UsageError.for_value("variance", "learned", "small, large", "the model predicts no variances")
        if self.cfg_scale != 1 and not objective.class_dropout_prob:
            fix = "no label was ever dropped in training, so there is no null label to guide away from"
            raise UsageError.for_value("cfg_scale", self.cfg_scale, "1", fix)
