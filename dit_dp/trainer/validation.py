"""The loss on what was held out, under the same draws every time."""

import torch

from dit_dp.trainer.trainer import Trainer

EXAMPLES = 256
"""Held-out units that are looked at: the first ones."""

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
    try:
        for part in torch.split(torch.arange(count), size):
            x, labels = data.take(part)
            labels = None if labels is None else labels.to(device)
            batch = trainer.objective.draw(x.to(device), labels, generator)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.config.dtype == "bf16"):
                total += float(trainer.objective(model, batch).sum())
    finally:
        model.train(was_training)
    return total / count
