"""How good samples are: distances between features of theirs and of real images, and what a classifier learns of them.

Names are resolved on first use, so that reading `dit_dp.evaluate.args` does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.evaluate.args import METRICS, EvaluateArgs, Evaluation
from dit_dp.lazy import lazily

if TYPE_CHECKING:
    from dit_dp.evaluate.classifier import Recipe, SmallClassifier, fit
    from dit_dp.evaluate.downstream import Accuracy, downstream_accuracy
    from dit_dp.evaluate.evaluate import run_evaluate
    from dit_dp.evaluate.features import extract, load_extractor, save_features
    from dit_dp.evaluate.metrics import frechet_distance, kernel_distance, precision_recall
    from dit_dp.evaluate.pictures import Pictures, load_pictures

_LAZY = {
    "Accuracy": "downstream",
    "Pictures": "pictures",
    "Recipe": "classifier",
    "SmallClassifier": "classifier",
    "downstream_accuracy": "downstream",
    "extract": "features",
    "fit": "classifier",
    "frechet_distance": "metrics",
    "kernel_distance": "metrics",
    "load_extractor": "features",
    "load_pictures": "pictures",
    "precision_recall": "metrics",
    "run_evaluate": "evaluate",
    "save_features": "features",
}

__all__ = [
    "METRICS",
    "Accuracy",
    "EvaluateArgs",
    "Evaluation",
    "Pictures",
    "Recipe",
    "SmallClassifier",
    "downstream_accuracy",
    "extract",
    "fit",
    "frechet_distance",
    "kernel_distance",
    "load_extractor",
    "load_pictures",
    "precision_recall",
    "run_evaluate",
    "save_features",
]


__getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for name, module in _LAZY.items()})
