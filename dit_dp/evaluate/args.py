"""What ``dit-dp evaluate`` is asked, and what it finds. No torch."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from dit_dp import validate
from dit_dp.errors import UsageError

METRICS = ("fid", "kid", "precision_recall", "downstream")
OF_FEATURES = ("fid", "kid", "precision_recall")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Compare samples with real images: FID, KID, precision, recall, and what a classifier learns from samples.

    Images come from an npz (arr_0 uint8 NHWC, arr_1 labels), an image folder, or the bundled mnist and digits; with
    :train or :test after the name, from one side of the split by each image's hash.
    """

    samples: tyro.conf.Positional[str]
    """Samples: an npz, an image folder, or mnist:train, for what real data reach."""
    reference: str | None = None
    """Real images that features are compared with."""
    test: str | None = None
    """Real images, with labels, that classifiers are tested on; nothing else is done with them."""
    features: Path | None = None
    """Weights of the feature extractor: TorchScript (.pt) or safetensors of `SmallClassifier`."""
    metrics: tuple[str, ...] = ()
    """fid, kid, precision_recall, downstream; default: all that the other options allow."""
    test_fraction: float = 0.2
    """Of the split that :train and :test are sides of."""
    neighbours: int = 3
    """Of precision and recall: the nearest one that gives a feature its radius."""
    kid_subset_size: int = 1000
    """Images in each subset of KID, at most as many as there are."""
    kid_subsets: int = 100
    """Subsets that KID is the mean over."""
    batch_size: int = 64
    """Images at a time in the feature extractor."""
    seed: int = 0
    """Of the classifiers and of KID's subsets."""
    device: str = "cpu"
    """Where features are taken and the CNN is trained."""
    output: Path | None = None
    """JSON file of the result."""

    def __post_init__(self) -> None:
        """Check every field, alone and together."""
        for name in self.metrics:
            validate.one_of("metrics", name, METRICS)
        for name in ("neighbours", "kid_subsets", "batch_size"):
            validate.integer(name, getattr(self, name))
        validate.integer("kid_subset_size", self.kid_subset_size, minimum=2)
        validate.integer("seed", self.seed, minimum=0)
        if not 0 < self.test_fraction < 1:
            raise UsageError.for_value("test_fraction", self.test_fraction, "a number > 0 and < 1")
        for name, needs in (("reference", OF_FEATURES), ("features", OF_FEATURES), ("test", ("downstream",))):
            wanted = [metric for metric in self.metrics if metric in needs]
            if wanted and getattr(self, name) is None:
                raise UsageError.for_value(name, None, f"a value, which {', '.join(wanted)} needs")
        if not self.chosen:
            fix = "--reference with --features for fid, kid and precision_recall; --test for downstream"
            raise UsageError.for_value("metrics", self.metrics, METRICS, fix)

    @property
    def chosen(self) -> tuple[str, ...]:
        """What is computed."""
        if self.metrics:
            return tuple(metric for metric in METRICS if metric in self.metrics)
        possible = OF_FEATURES if self.reference is not None and self.features is not None else ()
        return (*possible, "downstream") if self.test is not None else possible


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found; `None` where it was not asked for.

    None of it is private: numbers that compare samples with private images say something of those images, and are not
    covered by the epsilon that the samples were made under.

    Attributes:
        samples: Where the samples are from.
        num_samples: Of them.
        image_size: Side in pixels that everything was compared at.
        channels: Of the samples.
        reference: Where the real images are from that features were compared with.
        num_reference: Of them.
        features: File name of the extractor.
        features_sha256: Of the extractor's file.
        num_features: F.
        fid: Frechet distance (arXiv 1706.08500), squared, as always.
        kid: Mean of the subsets' squared MMD with a cubic kernel (arXiv 1801.01401).
        kid_std: Standard deviation over the subsets.
        precision: Fraction of samples inside the real images' manifold (arXiv 1904.06991).
        recall: Fraction of real images inside the samples'.
        test: Where the test images are from.
        num_test: Of them.
        cnn_accuracy: Of the CNN trained on the samples, on the test images, 0 to 1.
        logistic_accuracy: Of logistic regression.
        seed: Of all of it.
    """

    samples: str
    num_samples: int
    image_size: int
    channels: int
    reference: str | None = None
    num_reference: int | None = None
    features: str | None = None
    features_sha256: str | None = None
    num_features: int | None = None
    fid: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    test: str | None = None
    num_test: int | None = None
    cnn_accuracy: float | None = None
    logistic_accuracy: float | None = None
    seed: int = 0

    def describe(self) -> str:
        """Return what was found, a line each."""
        lines = [f"samples: {self.num_samples} of {self.samples}, {self.channels} x {self.image_size} px"]
        if self.num_features is not None:
            features = f"{self.num_features} features by {self.features}"
            lines.append(f"real images: {self.num_reference} of {self.reference}; {features}")
        shown = {
            "FID": self.fid,
            "KID": self.kid,
            "KID, deviation over subsets": self.kid_std,
            "precision": self.precision,
            "recall": self.recall,
        }
        lines += [f"{name}: {value:.5g}" for name, value in shown.items() if value is not None]
        if self.cnn_accuracy is not None and self.logistic_accuracy is not None:
            lines.append(
                f"trained on the samples, tested on {self.num_test} real images of {self.test}: CNN "
                f"{self.cnn_accuracy:.2%}, logistic regression {self.logistic_accuracy:.2%}"
            )
        lines.append("not private: what compares with private images is not covered by the samples' epsilon")
        return "\n".join(lines)
