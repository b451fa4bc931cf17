"""From what was asked for to noise, rate and steps. No torch."""

import logging
import math
from dataclasses import dataclass

from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.privacy import Mechanism, PrivacyStatement, noise_multiplier, steps_within
from dit_dp.trainer.config import TrainConfig
from dit_dp.workloads import WorkloadSpec
from dit_dp.workloads.registry import Unit

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run will do, and what that costs.

    Attributes:
        unit: Whom the promise is made to: ``image`` or ``set``.
        num_units: N.
        batch_size: Expected units a step, the divisor of the noised sum.
        sample_rate: q = B / N.
        num_steps: T.
        noise_multiplier: sigma; 0: no privacy.
        most_charges: Steps that the budget allows, lost ones included; `None`: no budget was given.
        delta: Of the budget.
        claim: What may be said of the whole run, in a line.
    """

    unit: Unit
    num_units: int
    batch_size: int
    sample_rate: float
    num_steps: int
    noise_multiplier: float
    most_charges: int | None
    delta: float
    claim: str


def plan_budget(config: TrainConfig, spec: WorkloadSpec, num_units: int) -> Budget:
    """Return what a run on so many units will do.

    Raises:
        UsageError: No data, a batch larger than the data, steps of no phase, or a budget that no noise keeps.
    """
    if num_units == 0:
        raise UsageError.for_value("data", config.data, "at least one unit", "the data set is empty")
    if config.batch_size > num_units:
        fix = f"the data has {num_units} {spec.workload.unit}s"
        raise UsageError.for_value("batch_size", config.batch_size, f"at most {num_units}", fix)
    rate = config.batch_size / num_units
    steps = config.steps or math.ceil((config.epochs or 0) / rate)
    last = spec.schedule.phases[-1].end
    if last is not None and steps > last:
        fix = f"the last phase ends after step {last}, and the run takes {steps}; leave its end out"
        raise UsageError.for_value("train", spec.train, "phases up to the last step", fix)
    sigma = config.noise_multiplier or 0.0
    most = None
    if config.epsilon is not None:
        if config.noise_multiplier is None:
            sigma = noise_multiplier(
                target_epsilon=config.epsilon, delta=config.delta, sample_rate=rate, num_steps=steps
            )
            most = steps  # the noise is for as many; steps that are lost and taken again are none more
        else:
            most = steps_within(
                target_epsilon=config.epsilon, delta=config.delta, sample_rate=rate, noise_multiplier=sigma
            )
        if most == 0:
            fix = f"one step with noise multiplier {sigma:g} at rate {rate:.4g} costs more"
            raise UsageError.for_value("epsilon", config.epsilon, "a larger budget, or more noise", fix)
    taken = steps if most is None else min(steps, most)
    if METHODS[config.method].private and config.delta >= 1 / num_units:
        log.warning("delta: %g is not below 1/N = %g, which protects nobody in particular", config.delta, 1 / num_units)
    return Budget(
        unit=spec.workload.unit,
        num_units=num_units,
        batch_size=config.batch_size,
        sample_rate=rate,
        num_steps=steps,
        noise_multiplier=sigma,
        most_charges=most,
        delta=config.delta,
        claim=claim(config, spec, num_units, [Mechanism(noise_multiplier=sigma, sample_rate=rate, num_steps=taken)]),
    )


def claim(config: TrainConfig, spec: WorkloadSpec, num_units: int, mechanisms: list[Mechanism]) -> str:
    """Return what may be said of what was charged, in a line."""
    if not METHODS[config.method].private:
        return f"no privacy: {config.method} neither clips nor adds noise"
    if config.insecure_seed is not None:
        return "no privacy: sampling and noise come from a seed, for tests"
    statement = PrivacyStatement(
        mechanisms=tuple(mechanisms),
        delta=config.delta,
        unit=spec.workload.unit,
        num_units=num_units,
        sampling=config.sampling,
    )
    if config.weights is None:
        return str(statement)
    said = "said to be public by --weights-are-public" if config.weights_are_public else "taken for public"
    return f"{statement}; not covered: the weights that it started from, {said}"
