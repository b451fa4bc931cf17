"""What a private method promises about its clipped sum, as checks; each takes a `Trial` and returns a `Check`.

Neighbouring batches differ by one example, added or removed. Lengths are in units of C.
"""

import copy

import torch
from torch import Tensor

from dit_dp.clipping.batch import trainable_parameters
from memory_test.doctor.case import Case, flatten, relative_error
from memory_test.doctor.facts import Check
from memory_test.doctor.trial import Trial

EXACT = 1e-5
"""Relative error of the clipped sum in float32: some hundred roundings of 2^-24 in a row."""

EXACT_FLOAT64 = 1e-11
"""The same in float64, where a rounding is 2^-53, with room for models that amplify it a hundredfold."""

SLACK = 1e-4
"""Rounding allowed in units of C, in float32: ten times `EXACT`, for differences of sums over several examples."""

SLACK_FLOAT64 = 1e-9
"""The same in float64, with as wide a margin for models that amplify rounding."""

_FLOAT32_INSIDE = "; no finding if the model or loss casts to float32 inside"

SCALES = (1.0, 1e3)
"""A changed example is another example's inputs times this."""


def coverage(trial: Trial) -> Check:
    """Every trainable parameter belongs to the engine, and has a gradient where the oracle's is not zero."""
    wanted = trainable_parameters(trial.case.model)
    engine = trial.attach()
    engine.accumulate(trial.case.loss_fn, trial.case.batch, trial.case.row_to_unit)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    exact = torch.split(trial.exact.total, [parameter.numel() for parameter in wanted.values()])
    missing = [
        name
        for name, value in zip(wanted, exact, strict=True)
        if name not in engine.parameters or (bool(value.any()) and not _has_gradient(engine.parameters[name]))
    ]
    text = f"trainable parameters without a gradient, of {len(wanted)}"
    return Check.of("coverage", len(missing), 0, f"{text}: {missing[0]}" if missing else text)


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def exactness(trial: Trial) -> Check:
    """The clipped sum is that of the float64 loop over examples.

    Where a plain loop in the model's precision is further off than a third of `EXACT`, three times its error is
    allowed: the rounding is then the model's.
    """
    measured = relative_error(trial.everyone().total, trial.exact.total)
    bound = max(EXACT, 3 * trial.exact.rounding)
    return Check.of("exactness", measured, bound, "relative error of the clipped sum against a float64 loop")


def exactness_in_float64(trial: Trial) -> Check:
    """The same in float64, where nothing that is wrong passes for rounding."""
    measured = relative_error(trial.in_float64().everyone().total, trial.exact.total)
    text = "relative error of the clipped sum against a float64 loop, in float64"
    return Check.of("float64", measured, EXACT_FLOAT64, text + _FLOAT32_INSIDE * (measured > EXACT_FLOAT64))


def removal(trial: Trial) -> Check:
    """Removing an example moves the sum by at most C, also one whose inputs are a thousand times another's."""
    everyone = trial.everyone().total
    moves = [trial.relative(everyone - trial.without(unit).total) for unit in trial.some_units()]
    unit = trial.some_units(1)[0]
    for scale in SCALES:
        changed = trial.run(with_anothers_values(trial.case, unit, scale)).total
        moves.append(trial.relative(changed - trial.without(unit).total))
    return Check.of("removal", max(moves), 1 + SLACK, "largest move of the sum when one example is removed, over C")


def independence(trial: Trial) -> Check:
    """Changing an example, whatever it becomes, leaves what the others contribute as it was.

    The sum over the changed batch, less the sum over the changed example alone, is the sum over the others. In
    float64: the rounding of an extreme example's own gradient, up to 1e-3 C in float32, is not the others'.
    """
    exact = trial.in_float64()
    worst = 0.0
    for unit in exact.some_units(2):
        for scale in SCALES:
            changed = with_anothers_values(exact.case, unit, scale)
            others = exact.run(changed).total - exact.run(changed.take([unit])).total
            worst = max(worst, exact.relative(others - exact.without(unit).total))
    text = "move of the others' sum when one example changes, over C, in float64"
    return Check.of("independence", worst, SLACK_FLOAT64, text + _FLOAT32_INSIDE * (worst > SLACK_FLOAT64))


def with_anothers_values(case: Case, unit: int, scale: float) -> Case:
    """Return a case in which a unit has the values of a row that is not its own, scaled where they float."""
    row = int((case.unit_of_row != unit).nonzero()[0, 0])

    def value(tensor: Tensor) -> Tensor:
        return tensor[row] * scale if tensor.is_floating_point() else tensor[row]

    return case.change(unit, value)


def order(trial: Trial) -> Check:
    """The order of the batch does not matter."""
    backwards = list(range(trial.num_units))[::-1]
    measured = trial.relative(trial.subset(backwards).total - trial.everyone().total)
    return Check.of("order", measured, SLACK, "move of the sum when the batch is reversed, over C")


def accumulation(trial: Trial) -> Check:
    """A batch taken in two parts, an empty one between them, gives the same sum."""
    half = trial.num_units // 2
    everyone = list(range(trial.num_units))
    parts = (trial.case.take(part) for part in (everyone[:half], [], everyone[half:]))
    measured = trial.relative(trial.run(*parts).total - trial.everyone().total)
    return Check.of("accumulation", measured, SLACK, "move of the sum when the batch comes in parts, over C")


def emptiness(trial: Trial) -> Check:
    """An empty batch gives zeros, and noise can be added to them."""
    measured = float(trial.subset([]).total.abs().max())
    return Check.of("empty batch", measured, 0, "largest entry of the sum over no example")


def restoration(trial: Trial) -> Check:
    """Detaching leaves the model as it was: same parameters, same function, no gradient."""
    engine = trial.attach()
    engine.accumulate(trial.case.loss_fn, trial.case.batch, trial.case.row_to_unit)
    model = engine.model
    engine.detach()
    plain = copy.deepcopy(trial.case.model)
    with torch.no_grad():
        left, right = (trial.case.loss_fn(m, trial.case.batch) for m in (model, plain))
    moved = float((left - right).abs().max())
    kept = flatten(p.detach() for p in model.parameters())
    moved = max(moved, float((kept - flatten(p.detach() for p in plain.parameters())).abs().max()))
    left_over = any(p.grad is not None for p in model.parameters())
    text = "change of losses and parameters by attach and detach"
    return Check.of("restoration", float("inf") if left_over else moved, 0, text)
