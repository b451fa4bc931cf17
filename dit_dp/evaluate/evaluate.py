"""``dit-dp evaluate``: from sources and weights to numbers."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_dp.console import say
from dit_dp.errors import UsageError
from dit_dp.evaluate.args import OF_FEATURES, EvaluateArgs, Evaluation
from dit_dp.evaluate.classifier import Recipe
from dit_dp.evaluate.downstream import downstream_accuracy
from dit_dp.evaluate.features import extract, load_extractor
from dit_dp.evaluate.metrics import frechet_distance, kernel_distance, precision_recall
from dit_dp.evaluate.pictures import Pictures, load_pictures
from dit_dp.files import write_whole


def run_evaluate(args: EvaluateArgs, recipe: Recipe | None = None) -> Evaluation:
    """Return what was asked for, and write it if an output was named.

    Args:
        args: What the user asked for.
        recipe: Of the downstream CNN; `None`: the fixed one that results are comparable under.

    Raises:
        UsageError: Sources that cannot be read or do not fit, too few images, or a file that cannot be written.
    """
    if args.output is not None:
        _check_writable(args.output)
    samples = load_pictures("samples", args.samples, test_fraction=args.test_fraction)
    found: dict[str, Any] = {}
    if set(args.chosen) & set(OF_FEATURES):
        found |= _by_features(args, samples)
    if "downstream" in args.chosen:
        found |= _downstream(args, samples, recipe)
    result = Evaluation(
        samples=args.samples,
        num_samples=len(samples),
        image_size=samples.size,
        channels=samples.channels,
        seed=args.seed,
        **found,
    )
    if args.output is not None:
        _save(result, args.output)
    return result


def evaluate(args: EvaluateArgs) -> int:
    """Evaluate samples and say what was found; returns the exit code."""
    say(run_evaluate(args).describe())
    if args.output is not None:
        say(f"result: {args.output}")
    return 0


def _by_features(args: EvaluateArgs, samples: Pictures) -> dict[str, Any]:
    """Return FID, KID, precision and recall, as far as they were asked for."""
    assert args.features is not None
    extractor = load_extractor(args.features, device=args.device)
    reference = _like("reference", args.reference, samples, args)

    def features(pictures: Pictures) -> Tensor:
        return extract(extractor, pictures.pixels, batch_size=args.batch_size, device=args.device)

    generated, real = features(samples), features(reference)
    found: dict[str, Any] = {
        "reference": args.reference,
        "num_reference": len(reference),
        "features": args.features.name,
        "features_sha256": hashlib.sha256(args.features.read_bytes()).hexdigest(),
        "num_features": real.shape[1],
    }
    if "fid" in args.chosen:
        found["fid"] = frechet_distance(generated, real)
    if "kid" in args.chosen:
        found["kid"], found["kid_std"] = kernel_distance(
            generated, real, subset_size=args.kid_subset_size, num_subsets=args.kid_subsets, seed=args.seed
        )
    if "precision_recall" in args.chosen:
        found["precision"], found["recall"] = precision_recall(generated, real, neighbours=args.neighbours)
    return found


def _downstream(args: EvaluateArgs, samples: Pictures, recipe: Recipe | None) -> dict[str, Any]:
    """Return the accuracies of classifiers trained on the samples."""
    test = _like("test", args.test, samples, args)
    accuracy = downstream_accuracy(samples, test, recipe=recipe, seed=args.seed, device=args.device)
    return {
        "test": args.test,
        "num_test": accuracy.num_test,
        "cnn_accuracy": accuracy.cnn,
        "logistic_accuracy": accuracy.logistic,
    }


def _like(name: str, source: str | None, samples: Pictures, args: EvaluateArgs) -> Pictures:
    """Return real images, brought to the samples' size and channels."""
    assert source is not None
    return load_pictures(name, source, size=samples.size, channels=samples.channels, test_fraction=args.test_fraction)


def _check_writable(path: Path) -> None:
    """Raise `UsageError` before any work if the result could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UsageError.for_value("output", str(path), "a file in a folder that can be written")
    except OSError as error:
        raise UsageError(f"output: cannot write {path}: {error.strerror or error}") from error


def _save(result: Evaluation, path: Path) -> None:
    """Write a result so that a reader sees all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(dataclasses.asdict(result), indent=2) + "\n").encode(), sync=False)
    except OSError as error:
        raise UsageError(f"output: cannot write {path}: {error.strerror or error}") from error
