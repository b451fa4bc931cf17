"""From noise to samples.

Shapes: N samples, C channels, H x W positions, M images of a set.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.objectives import Objective
from dit_dp.sampling.config import SamplingConfig
from dit_dp.sampling.guidance import Condition, Denoiser
from dit_dp.sampling.noise import Streams
from dit_dp.sampling.steps import DATA, ancestral_step, ddim_step, euler_step, level, time_grid

Decode = Callable[[Tensor], Tensor]
"""From latents (N, C, H, W) to images (N, 1 or 3, H', W') in [-1, 1]."""


def labels_for(num_samples: int, num_classes: int, classes: Sequence[int] = ()) -> Tensor:
    """Return labels of samples, (N,) int64: the classes in turn, so that counts differ by at most one.

    Args:
        num_samples: N.
        num_classes: Number of labels the model knows.
        classes: Which to draw; none: all of them.

    Raises:
        UsageError: A class that the model does not know.
    """
    validate.integer("num_samples", num_samples)
    for label in classes:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
            raise UsageError.for_value("classes", label, f"labels from 0 to {num_classes - 1}")
    chosen = torch.tensor(list(classes) if classes else range(num_classes))
    return chosen[torch.arange(num_samples) % len(chosen)]


def sample_from(
    model: nn.Module,
    objective: Objective,
    *,
    shape: Sequence[int],
    labels: Tensor | None = None,
    context: Tensor | None = None,
    config: SamplingConfig | None = None,
    batch_size: int = 32,
    seed: int = 0,
    first: int = 0,
    decode: Decode | None = None,
) -> Tensor:
    """Return samples, in order; `iterate` gives them batch by batch.

    Args:
        model: Called as it stands: see `dit_dp.sampling.evaluating` for evaluation mode and averages.
        objective: What it was trained on.
        shape: (C, H, W) of the model's input.
        labels: (N,), of a model of images.
        context: (N, M - 1, C, H, W), of a model of sets: the given images of each sample's set.
        config: How.
        batch_size: Samples at a time.
        seed: Of the noise: the same seed gives sample number i the same noise, whatever N and `batch_size`.
        first: Number of the first sample, where several processes share the work.
        decode: A front-end's decoder, from latents to images.

    Returns:
        (N, C, H, W), or what `decode` makes of it, on the CPU, float32 or better.

    Raises:
        UsageError: A sampler, steps or guidance that the model cannot have, labels or context missing or not wanted.
    """
    parts = iterate(
        model,
        objective,
        shape=shape,
        labels=labels,
        context=context,
        config=config,
        batch_size=batch_size,
        seed=seed,
        first=first,
        decode=decode,
    )
    return torch.cat([part.cpu() for part in parts])


def iterate(
    model: nn.Module,
    objective: Objective,
    *,
    shape: Sequence[int],
    labels: Tensor | None = None,
    context: Tensor | None = None,
    config: SamplingConfig | None = None,
    batch_size: int = 32,
    seed: int = 0,
    first: int = 0,
    decode: Decode | None = None,
) -> Iterator[Tensor]:
    """Yield samples batch by batch, on the model's device; arguments are those of `sample_from`."""
    config = config or SamplingConfig()
    config.check(objective.config)
    validate.integer("batch_size", batch_size)
    validate.integer("seed", seed, minimum=0)
    count = _count(objective, labels, context, shape)
    parameter = next(model.parameters(), torch.zeros(()))
    device, dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
    for start in range(0, count, batch_size):
        rows = range(start, min(start + batch_size, count))
        streams = Streams(seed, [first + row for row in rows], device=device, dtype=dtype)
        of_rows = slice(rows.start, rows.stop)
        condition = Condition(
            None if labels is None else labels[of_rows].to(device),
            None if context is None else context[of_rows].to(device),
            streams.normal(objective.config.context_shape) if objective.config.context_shape is not None else None,
        )
        with torch.no_grad():  # for each batch: a generator must not leave its caller without gradients
            x = _denoised(model, objective, tuple(shape), condition, config, streams)
            x = x if decode is None else decode(x)
        yield x


def _denoised(
    model: nn.Module,
    objective: Objective,
    shape: tuple[int, ...],
    condition: Condition,
    config: SamplingConfig,
    streams: Streams,
) -> Tensor:
    """Return one batch, (N, C, H, W), from its first noise to its last step."""
    path, trained = objective.path, objective.config
    ask = Denoiser(model, trained, cfg_scale=config.cfg_scale, guide_channels=config.guide_channels)
    variance = config.variance or ("learned" if trained.learn_sigma else "small")
    x = config.start_scale * streams.normal(shape)  # (N, C, H, W)
    times = time_grid(trained, config.num_steps)
    levels = [*(level(path, t) for t in times), DATA]
    for place, t in enumerate(times):
        prediction, fraction = ask(x, t, condition)
        here, there = levels[place], levels[place + 1]
        at = t.to(x.device).expand(len(x))
        x0 = path.to_x0(trained.target, prediction, x, at)
        x0 = x0.clamp(-1, 1) if config.clamp else x0
        noisy = there.sigma > 0 and (config.sampler == "ancestral" or config.eta > 0)
        z = streams.normal(shape) if noisy else None
        if config.sampler == "ancestral":
            x = ancestral_step(x, x0, here, there, z=z, variance=variance, fraction=fraction)
            continue
        # Of a clamped x0 the noise is that which makes the sample with it, as in the reference.
        eps = (x - here.alpha * x0) / here.sigma if config.clamp else path.to_eps(trained.target, prediction, x, at)
        if config.sampler == "ddim":
            x = ddim_step(x0, eps, here, there, eta=config.eta, z=z)
        else:
            velocity = prediction if trained.target == "v" and not config.clamp else path.velocity(x0, eps, at)
            x = euler_step(x, velocity, t.item(), times[place + 1].item() if place + 1 < len(times) else 0.0)
    return x


def _count(objective: Objective, labels: Tensor | None, context: Tensor | None, shape: Sequence[int]) -> int:
    """Return N, or raise `UsageError` unless the samples have the condition their model wants."""
    size = objective.config.set_size
    if size is None:
        if labels is None or labels.dim() != 1 or not len(labels) or context is not None:
            got = "context" if context is not None else None if labels is None else tuple(labels.shape)
            raise UsageError.for_value(
                "labels", got, "a label for each sample, shape (N,), N >= 1", "the model is of images"
            )
        return len(labels)
    wanted = (size - 1, *shape)
    if labels is not None or context is None or tuple(context.shape[1:]) != wanted or not len(context):
        got = "labels" if labels is not None else None if context is None else tuple(context.shape)
        accepted = f"given images of each sample's set, shape {('N', *wanted)}".replace("'", "")
        raise UsageError.for_value("context", got, accepted, "the model is of sets")
    return len(context)
