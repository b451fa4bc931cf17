"""``dit-dp sample``: draw samples from a checkpoint and write them. No torch until it runs."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dit_dp import validate
from dit_dp.console import say
from dit_dp.errors import UsageError
from dit_dp.sampling.config import GUIDE_CHANNELS, SAMPLERS, VARIANCES, SamplingConfig
from dit_dp.workloads.config import WorkloadSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

GRID_SAMPLES = 64
"""Samples in the picture."""


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Draw samples from a checkpoint: a grid as PNG, and an npz or single images if asked for."""

    checkpoint: Path
    """Folder of a training run, of which the newest checkpoint is taken, or of one checkpoint."""
    output: Path | None = None
    """Folder of what is written; default: a new one in the run's, samples-step-00001234, with a number if need be."""
    weights: Path | None = None
    """What the run started from, where its checkpoint keeps only what trained; default: what the run says."""
    num_samples: int = 16
    """How many, over all classes."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1: none."""
    guide_channels: Annotated[str, tyro.conf.arg(metavar="{3,all}")] = "all"
    """Channels that are guided: all, as diffusers does, or the first 3, as the reference DiT does."""
    sampler: Annotated[str | None, tyro.conf.arg(metavar="{ancestral,ddim,euler}")] = None
    """Default: the workload's own."""
    steps: int | None = None
    """Model evaluations a sample; default: the workload's own."""
    variance: Annotated[str | None, tyro.conf.arg(metavar="{learned,small,large}")] = None
    """Of ancestral: learned, where the model predicts variances, small (the posterior's) or large (beta)."""
    eta: float | None = None
    """Of ddim: 0 draws no noise after the start, 1 as much as the posterior has."""
    clamp: bool | None = None
    """Clamp the predicted image to [-1, 1] at each step; default: for pixels, not for latents."""
    classes: tuple[int, ...] = ()
    """Labels to draw, in turn; default: all."""
    context: str | None = None
    """Of a model of sets, where the given images are from: digits, mnist or an image folder."""
    seed: int = 0
    """Sample number i of a seed is the same whatever the number of samples and the batch size, up to rounding."""
    batch_size: int = 16
    """Samples at a time."""
    npz: bool = False
    """Write samples.npz as well: arr_0 uint8 NHWC, arr_1 labels."""
    images: bool = False
    """Write each sample as images/LABEL/NUMBER.png as well."""
    frontend: str | None = None
    """Weights of the front-end that decodes latents: a local folder, or a hub name."""
    frontend_statistics: str | None = None
    """What latents were normalised by in training, of the front-end rae: a safetensors file, or none."""
    ema: bool | None = None
    """Sample from the averaged weights; default: where the checkpoint has some."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        """Check every field that needs no checkpoint."""
        for name in ("num_samples", "batch_size"):
            validate.integer(name, getattr(self, name))
        validate.integer("seed", self.seed, minimum=0)
        validate.one_of("guide_channels", self.guide_channels, GUIDE_CHANNELS)
        for name, value, accepted in (
            ("sampler", self.sampler, SAMPLERS),
            ("variance", self.variance, VARIANCES),
        ):
            if value is not None:
                validate.one_of(name, value, accepted)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint holds for those who sample from it.

    Attributes:
        spec: The workload.
        model: With the weights of the last step.
        averages: By parameter name; empty: there are none.
    """

    spec: WorkloadSpec
    model: "nn.Module"
    averages: "Mapping[str, Tensor]"


def load_for_sampling(path: Path, weights: Path | None = None) -> Trained:
    """Return what a run left in a folder.

    Args:
        path: Of one checkpoint, ``step-00001234``; or of a run, or of its checkpoints, of which the newest is taken.
        weights: That the run started from, if they are no longer where it found them.

    Raises:
        UsageError: No checkpoint there, a damaged one, one of another version, or other base weights than the run's.
    """
    from dit_dp.trainer.saving import base_model
    from dit_dp.training.checkpoint import load, load_trained
    from dit_dp.training.groups import add_lora
    from dit_dp.workloads import stored_spec

    found = _checkpoint_of(path)
    checkpoint = load(found)
    spec = stored_spec(checkpoint.state.spec)
    model = base_model(spec, found, weights)
    if spec.schedule.lora_rank is not None:
        add_lora(model, spec.schedule.lora_rank)
    load_trained(model, checkpoint, averaged=False)
    return Trained(spec=spec, model=model, averages=checkpoint.averages or {})


def _checkpoint_of(path: Path) -> Path:
    """Return the folder of the checkpoint that a path means: itself, or the newest below it."""
    from dit_dp.training.checkpoint import latest
    from dit_dp.training.checkpoint_state import STATE

    if (path / STATE).exists():
        return path
    for folder in (path, path / "checkpoints"):
        newest = latest(folder) if folder.is_dir() else None
        if newest is not None:
            return newest
    raise UsageError.for_value("checkpoint", str(path), "a folder that is, or has, a whole checkpoint")


def _run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint is of, or the one that it is in."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


def _new_folder(checkpoint: Path) -> Path:
    """Make and return a folder for samples of a checkpoint beside it: the first of its name that is not there yet."""
    name, count = f"samples-{checkpoint.resolve().name}", 1
    while True:
        folder = _run_of(checkpoint) / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
        except OSError as error:
            raise UsageError(f"output: cannot make {folder}: {error.strerror or error}") from error
        else:
            return folder


def run_sample(args: SampleArgs, load: "Callable[[Path], Trained] | None" = None) -> list[Path]:
    """Draw samples and write them.

    Args:
        args: What the user asked for.
        load: Reads a checkpoint; default: `load_for_sampling`.

    Returns:
        The files: ``grid.png``, ``samples.npz``, and the folder ``images``.

    Raises:
        UsageError: Whatever does not fit the checkpoint, or a folder that cannot be written.
    """
    import torch

    from dit_dp.objectives import Objective
    from dit_dp.sampling import evaluating, iterate, to_uint8
    from dit_dp.workloads import input_shape

    device = _device(args.device)
    checkpoint = args.checkpoint if args.output is not None else _checkpoint_of(args.checkpoint)
    _check_writable(args.output or _run_of(checkpoint))
    trained = (load or partial(load_for_sampling, weights=args.weights))(checkpoint)
    spec = trained.spec
    config = _config(args, spec)
    labels, context = _labels(args, spec), _context(args, spec)
    averages = _averages(args, trained)
    decode = _decoder(args, spec)
    model = trained.model.to(device)
    with evaluating(model, averages):
        parts = iterate(
            model,
            Objective(spec.objective),
            shape=input_shape(spec)[-3:],
            labels=labels,
            context=context,
            config=config,
            batch_size=args.batch_size,
            seed=args.seed,
            decode=decode,
        )
        # As pixels, of which 50,000 of 256 x 256 take 10 GB and not 40.
        pixels = torch.cat([to_uint8(part) for part in _logged(parts, args.num_samples)])
    return _write(args, args.output or _new_folder(checkpoint), pixels, labels)


def sample(args: SampleArgs) -> int:
    """Draw samples, write them and say where; returns the exit code."""
    for path in run_sample(args):
        say(str(path))
    return 0


def _logged(parts: "Iterator[Tensor]", count: int) -> "Iterator[Tensor]":
    """Say after each batch how many samples there are."""
    done = 0
    for part in parts:
        done += len(part)
        log.info("sample: %d of %d", done, count)
        yield part


def _averages(args: SampleArgs, trained: Trained) -> "Mapping[str, Tensor] | None":
    """Return the averages to sample from; `None`: the weights of the last step."""
    if args.ema and not trained.averages:
        raise UsageError.for_value("ema", True, "--no-ema", f"{args.checkpoint} has no averages")
    return None if args.ema is False else trained.averages


def _config(args: SampleArgs, spec: WorkloadSpec) -> SamplingConfig:
    """Return how samples are drawn, checked against what the model was trained on."""
    config = SamplingConfig.of(
        spec,
        sampler=args.sampler,
        num_steps=args.steps,
        variance=args.variance,
        eta=args.eta,
        clamp=args.clamp,
        cfg_scale=args.cfg_scale,
        guide_channels=args.guide_channels,
    )
    config.check(spec.objective)
    return config


def _decoder(args: SampleArgs, spec: WorkloadSpec) -> "Callable[[Tensor], Tensor] | None":
    """Return what makes images of latents; `None` where the model's samples are images."""
    from dit_dp.frontends import make_frontend

    if args.frontend is None:
        if spec.in_latents or spec.in_channels not in (1, 3):
            fix = f"{spec.name} samples latents of {spec.in_channels} channels"
            raise UsageError.for_value("frontend", None, "weights of the front-end that decodes them", fix)
        return None
    kind = spec.workload.frontend
    if not spec.in_latents or kind is None:
        raise UsageError.for_value("frontend", args.frontend, "None", f"this {spec.name} samples pixels")
    frontend = make_frontend(kind, args.frontend, statistics=args.frontend_statistics, device=args.device)
    if frontend.latent_channels != spec.in_channels:
        accepted = f"a front-end of {spec.in_channels} latent channels"
        raise UsageError.for_value("frontend", f"{frontend.latent_channels} channels", accepted)
    return frontend.decode


def _labels(args: SampleArgs, spec: WorkloadSpec) -> "Tensor | None":
    """Return the samples' labels; `None` for a model of sets."""
    from dit_dp.sampling import labels_for

    if spec.num_classes is not None:
        return labels_for(args.num_samples, spec.num_classes, args.classes)
    if args.classes and args.context is None:
        raise UsageError.for_value("classes", args.classes, "no classes", f"{spec.name} has no labels")
    return None


def _context(args: SampleArgs, spec: WorkloadSpec) -> "Tensor | None":
    """Return the given images of each sample's set, (N, M - 1, C, H, W); `None` for a model of images."""
    import torch

    from dit_dp.data import Images, digits, image_folder, mnist
    from dit_dp.sampling import labels_for

    size = spec.objective.set_size
    if size is None:
        if args.context is not None:
            raise UsageError.for_value("context", args.context, "None", f"{spec.name} is of images, not of sets")
        return None
    if args.context is None:
        raise UsageError.for_value("context", None, "digits, mnist, an image folder", f"{spec.name} is of sets")
    images: Images
    if args.context == "digits":
        images = digits(size=spec.latent_size)
    elif args.context == "mnist":
        images = mnist(size=spec.latent_size, channels=spec.in_channels)
    else:
        images = image_folder(args.context, size=spec.latent_size, channels=spec.in_channels)
    labels = labels_for(args.num_samples, images.num_classes, args.classes)
    generator = torch.Generator().manual_seed(args.seed)
    sets = []
    for label in labels.tolist():
        members = (images.labels == label).nonzero().flatten()
        if len(members) < size - 1:
            fix = f"label {label} has {len(members)} images, a set needs {size - 1} given ones"
            raise UsageError.for_value("context", args.context, "data with enough images of each class", fix)
        chosen = members[torch.randperm(len(members), generator=generator)[: size - 1]]
        sets.append(images.take(chosen)[0])
    return torch.stack(sets)


def _device(name: str) -> str:
    """Return a device that is there, or raise `UsageError`."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        cause = " ".join(str(error).split())
        raise UsageError.for_value("device", name, "cpu, or a GPU that is there", cause) from error
    return name


def _check_writable(folder: Path) -> None:
    """Make the folder, and raise `UsageError` before any work if nothing can be written there."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"output: cannot write into {folder}: {error.strerror or error}") from error


def _write(args: SampleArgs, output: Path, pixels: "Tensor", labels: "Tensor | None") -> list[Path]:
    """Write what was asked for and return the paths."""
    from dit_dp.sampling import save_grid, save_images, save_npz

    written = [save_grid(pixels[:GRID_SAMPLES], output / "grid.png")]
    if args.npz:
        written.append(save_npz(pixels, output / "samples.npz", labels))
    if args.images:
        written.append(save_images(pixels, output / "images", labels))
    return written
