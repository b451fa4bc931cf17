"""The noise that is released: as large as promised, in every parameter."""

import math

import torch
from torch import Tensor

from memory_test.doctor.facts import Check
from memory_test.doctor.trial import Trial, released

NOISE_MULTIPLIER = 2.0
"""sigma of the check; not 1, so that a forgotten factor shows."""

FALSE_ALARM = 1e-6
"""Chance that correct noise fails the check."""


def noise(trial: Trial) -> Check:
    """Released minus clean gradient has standard deviation sigma C: over all entries, and in each parameter.

    With n entries z of standard normal noise, sum(z^2) has a chi-square distribution with n degrees of freedom.
    The two-sided p-values of all parameters and of all entries together are corrected by their number
    (Bonferroni), so that correct noise fails with probability at most `FALSE_ALARM`.
    """
    engine = trial.attach()
    engine.accumulate(trial.case.loss_fn, trial.case.batch, trial.case.row_to_unit)
    generator = torch.Generator(device=next(iter(engine.parameters.values())).device)
    generator.manual_seed(int(torch.randint(2**31, (1,), generator=trial.generator)))
    engine.privatize(noise_multiplier=NOISE_MULTIPLIER, expected_batch_size=1, generator=generator)
    std = NOISE_MULTIPLIER * trial.max_grad_norm
    z = (released(engine) - trial.everyone().total).double() / std
    sizes = [parameter.numel() for parameter in engine.parameters.values()]
    parts = dict(zip(engine.parameters, torch.split(z, sizes), strict=True))
    tests = {"all entries": z, **parts}
    surprises = {name: surprise(part, len(tests)) for name, part in tests.items()}
    worst = max(surprises, key=lambda name: surprises[name])
    ratio = float(z.square().mean().sqrt())
    text = f"surprise -log10 p of its size; std {ratio:.4g} sigma C over {z.numel():,} entries"
    bound = -math.log10(FALSE_ALARM)
    where = f"; worst: {worst}, std {float(parts.get(worst, z).square().mean().sqrt()):.4g} sigma C"
    return Check.of("noise", surprises[worst], bound, text + (where if surprises[worst] > bound else ""))


def surprise(z: Tensor, num_tests: int = 1) -> float:
    """Return -log10 of the two-sided p-value of ``sum(z^2)`` under standard normal z, times a number of tests.

    Args:
        z: (n,) numbers, float64.
        num_tests: How many such p-values are looked at together.

    Returns:
        0 for nothing to see; infinity where the p-value underflows, or z is not finite.
    """
    if not bool(torch.isfinite(z).all()):
        return math.inf
    half_dof = torch.tensor(z.numel() / 2, dtype=torch.float64)
    half_sum = z.square().sum().cpu() / 2
    below, above = torch.special.gammainc(half_dof, half_sum), torch.special.gammaincc(half_dof, half_sum)
    p_value = min(1.0, 2 * num_tests * float(torch.minimum(below, above)))
    return abs(math.log10(p_value)) if p_value > 0 else math.inf
