"""What is looked at besides training: the loss on what was held out, contexts, the model's graph and weights."""

import torch
from torch import Tensor

from dit_dp.clipping.gathered import root_gathered
from dit_dp.trainer.trainer import Trainer
from dit_dp.workloads import input_shape

EXAMPLES = 256
"""Held-out units that are looked at: the first ones."""

CONTEXTS = 8
"""Held-out sets whose contexts are logged."""

_SEED = 20_200_617


@torch.no_grad()
def validation_loss(trainer: Trainer) -> float:
    """Return the mean loss of held-out units; times and noise are the same at every call, so that losses compare."""
    data = trainer.data.held_out
    assert data is not None
    model, device = trainer.runner.model, trainer.world.device
    generator = torch.Generator(device).manual_seed(_SEED)
    was_training = model.training
    model.eval()
    total, count = 0.0, min(EXAMPLES, len(data))
    size = min(count, trainer.config.physical_batch_size or 64)
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.config.dtype == "bf16")
    try:
        with root_gathered(model):
            for part in torch.split(torch.arange(count), size):
                x, labels = data.take(part)
                labels = None if labels is None else labels.to(device)
                batch = trainer.objective.draw(x.to(device), labels, generator)
                with bf16:
                    total += float(trainer.objective(model, batch).sum())
    finally:
        model.train(was_training)
    return total / count


@torch.no_grad()
def held_out_contexts(trainer: Trainer) -> Tensor | None:
    """Return contexts of a few held-out sets at half the noise, (R, ...); `None` without any."""
    data, model, device = trainer.data.held_out, trainer.runner.model, trainer.world.device
    if data is None or trainer.spec.workload.unit != "set":
        return None
    sets, _ = data.take(torch.arange(min(CONTEXTS, len(data))))  # (b, M, C, H, W)
    rows = sets.flatten(0, 1).to(device)
    t = torch.full((len(rows),), trainer.spec.objective.num_steps // 2, device=device)
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.config.dtype == "bf16")
    with root_gathered(model), bf16:
        contexts: Tensor = model.context(rows, t)  # type: ignore[operator]
    return contexts


def example_inputs(trainer: Trainer) -> tuple[Tensor, ...]:
    """Return what the model is called with for one unit, made of zeros: for a picture of its graph."""
    zeros = torch.zeros(1, *input_shape(trainer.spec), device=trainer.world.device)
    labels = None if trainer.spec.num_classes is None else torch.zeros(1, dtype=torch.int64, device=zeros.device)
    batch = trainer.objective.draw(zeros, labels)
    names = ("x_t", "t", "y") if labels is not None else ("x_t", "t", "x0", "context_noise")
    return tuple(batch[name] for name in names if name in batch)
