"""Feature extractors from local weights: whatever network as TorchScript, or a small CNN as safetensors.

Shapes: N images, C channels, H x W pixels, F features.

An extractor is a function from 8-bit pixels (N, 3, H, W), uint8, to features (N, F), as in the evaluations of the
field; a network that wants another size resizes inside. No weights are ever downloaded.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_dp.errors import UsageError
from dit_dp.evaluate.classifier import SmallClassifier, scaled

Extractor = Callable[[Tensor], Any]
"""From (N, 3, H, W) uint8 to (N, F), or to a tuple that begins with it."""
SUFFIXES = (".pt", ".torchscript", ".safetensors")
_KIND = "dit-dp SmallClassifier"


def load_extractor(path: Path | str, *, device: str | torch.device = "cpu") -> Extractor:
    """Return the feature extractor of a file.

    Args:
        path: TorchScript (``.pt``, ``.torchscript``), called with ``return_features=True`` if its forward knows the
            name, as the published InceptionV3 of StyleGAN does; or ``.safetensors`` by `save_features`. TorchScript
            is a program, limited to torch's operations: take it from whom you trust.
        device: Where it runs.

    Raises:
        UsageError: No such file, another format, or weights that do not fit.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError.for_value("features", str(path), f"a file of weights: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError.for_value("features", str(path), "a file that exists")
    return _small(path, device) if path.suffix == ".safetensors" else _script(path, device)


def save_features(model: SmallClassifier, path: Path | str) -> None:
    """Write a classifier's weights so that `load_extractor` reads them.

    Raises:
        UsageError: The file cannot be written.
    """
    sizes = {"channels": model.channels, "num_classes": model.num_classes, "width": model.width}
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path, metadata={"kind": _KIND, "sizes": json.dumps(sizes)})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"features: cannot write {path}: {' '.join(str(error).split())}") from error


@torch.no_grad()
def extract(
    extractor: Extractor, pixels: Tensor, *, batch_size: int = 64, device: str | torch.device = "cpu"
) -> Tensor:
    """Return the features of images, (N, F) float64 on the CPU.

    Args:
        extractor: From `load_extractor`.
        pixels: (N, C, H, W) uint8; grey ones are given three times.
        batch_size: Images at a time.
        device: The extractor's.

    Raises:
        UsageError: The extractor fails on the images, or returns no finite (N, F).
    """
    found = []
    for start in range(0, len(pixels), batch_size):
        part = pixels[start : start + batch_size]
        part = part if part.shape[1] == 3 else part.repeat(1, 3, 1, 1)
        try:
            features = extractor(part.to(device))
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UsageError(f"features: the extractor fails on {tuple(part.shape)} uint8: {lines[-1]}") from error
        features = features[0] if isinstance(features, (tuple, list)) else features
        if not isinstance(features, Tensor) or features.shape[0] != len(part) or features.dim() < 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UsageError.for_value("features", got, f"an extractor that returns ({len(part)}, F)")
        found.append(features.flatten(1).double().cpu())
    features = torch.cat(found)
    if not features.isfinite().all():
        raise UsageError("features: the extractor returns numbers that are not finite")
    return features


def _small(path: Path, device: str | torch.device) -> Extractor:
    """Return the features of a `SmallClassifier`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("kind") != _KIND:
            raise UsageError.for_value("features", str(path), "safetensors written by save_features")
        model = SmallClassifier(**json.loads(metadata["sizes"]))
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"features: cannot read {path}: {' '.join(str(error).split())}") from error
    model = model.to(device).eval().requires_grad_(False)

    def features(pixels: Tensor) -> Tensor:
        x = scaled(pixels)
        return model.features(x if model.channels == 3 else x.mean(1, keepdim=True))

    return features


def _script(path: Path, device: str | torch.device) -> Extractor:
    """Return a TorchScript module's features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's successors cannot read what is published
        try:
            module: Any = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            cause = lines[0] if lines else type(error).__name__
            raise UsageError(f"features: cannot read {path} as TorchScript: {cause}") from error
    module = module.eval()
    names = [argument.name for argument in module.forward.schema.arguments] if hasattr(module.forward, "schema") else []
    more = {"return_features": True} if "return_features" in names else {}

    def features(pixels: Tensor) -> Any:
        return module(pixels, **more)

    return features
