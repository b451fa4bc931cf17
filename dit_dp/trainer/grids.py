"""A grid of samples in the middle of training."""

import torch
from PIL.Image import Image

from dit_dp.sampling import SamplingConfig, evaluating, grid, labels_for, sample_from
from dit_dp.trainer.trainer import Trainer
from dit_dp.workloads import input_shape

STEPS = 50
"""Of a grid's samples, at most: they are for looking at."""


def draw_grid(trainer: Trainer) -> Image | None:
    """Return a picture of samples from the averaged weights, the same noise every time.

    Samples are a function of released weights, so no privacy is lost; those of a set model also are of the images they
    are given, which are held-out ones.

    Returns:
        `None` where nothing can be shown: latents without a decoder, or a set model without held-out sets.
    """
    config, spec, world = trainer.config, trainer.spec, trainer.world
    if spec.in_latents and trainer.data.decode is None:
        return None
    sampler = "ddim" if spec.objective.is_ddpm else None
    steps = min(STEPS, spec.workload.sampling_steps)
    how = SamplingConfig.of(spec, sampler=sampler, num_steps=steps, cfg_scale=config.cfg_scale)
    labels, context = None, None
    if spec.num_classes is not None:
        labels = labels_for(config.num_samples, spec.num_classes, config.classes or ())
    else:
        others = trainer.data.held_out
        if others is None:
            return None
        sets, _ = others.take(torch.arange(min(config.num_samples, len(others))))  # (N, M, C, H, W)
        context = sets[:, 1:]
    with (
        evaluating(trainer.runner.model, trainer.runner.averages) as model,
        torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16"),
    ):
        samples = sample_from(
            model,
            trainer.objective,
            shape=input_shape(spec)[-3:],
            labels=labels,
            context=context,
            config=how,
            decode=trainer.data.decode,
        )
    return grid(samples)
