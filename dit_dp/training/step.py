"""One training step, the same for every method: the only training loop body of the project."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn
from dit_dp.clipping.engine import Engine
from dit_dp.errors import UsageError
from dit_dp.training.ema import Ema

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
IMPLEMENTATIONS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "for-loop": {"foreach": False}}


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    implementation: str,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.0,
) -> torch.optim.Optimizer:
    """Return an optimizer.

    Args:
        name: A key of `OPTIMIZERS`.
        parameters: What it updates.
        learning_rate: Step size.
        implementation: ``foreach``, ``fused`` or ``for-loop``; said explicitly, since each takes other memory.
        weight_decay: Of all parameters.
        betas: Of adamw and adam.
        momentum: Of sgd.

    Raises:
        UsageError: Unknown name or implementation.
    """
    if name not in OPTIMIZERS:
        raise UsageError.for_value("optimizer", name, OPTIMIZERS)
    if implementation not in IMPLEMENTATIONS:
        raise UsageError.for_value("optimizer_impl", implementation, IMPLEMENTATIONS)
    arguments: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, **IMPLEMENTATIONS[implementation]}
    arguments |= {"momentum": momentum} if name == "sgd" else {"betas": betas}
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name](parameters, **arguments)
    return optimizer


def train_step(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    noise_multiplier: float,
    expected_batch_size: float,
    generator: torch.Generator | None = None,
    ema: Ema | None = None,
    on_phase: Callable[[str], None] | None = None,
    row_to_unit: Callable[[Batch], Tensor | None] | None = None,
) -> Tensor | None:
    """Take one step.

    Args:
        engine: A method attached to the model.
        optimizer: Over the engine's parameters.
        loss_fn: Per-unit losses, (U,).
        batches: Physical batches of whole units that make one logical batch; each is asked for when the last is done.
        noise_multiplier: sigma; 0 for `vanilla`.
        expected_batch_size: The divisor of the noised sum.
        generator: Source of the noise.
        ema: Updated with the parameters.
        on_phase: Told ``optimizer`` when the update begins; the engine announces the phases before.
        row_to_unit: Gives the map of a batch's rows to units, as `Objective.row_to_unit`; default: each row is one.

    Returns:
        (U,) norms before clipping, or `None` where the method has none.
    """
    norms = [engine.accumulate(loss_fn, batch, row_to_unit and row_to_unit(batch)) for batch in batches]
    engine.privatize(noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size, generator=generator)
    if on_phase is not None:
        on_phase("optimizer")
    optimizer.step()
    if ema is not None:
        ema.update()
    engine.zero_grad()
    known = [norm for norm in norms if norm is not None]
    return torch.cat(known) if len(known) == len(norms) else None
