"""Options that say which model is meant. No torch, so that ``--help`` answers at once."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig, check_spec, is_custom


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A named DiT with its sizes, a pretrained one, or a callable of the user's own."""

    model: str
    """DiT-{S,B,L,XL}/{2,4,8}; with --pretrained a hub name or a local folder; or module:callable of your own."""
    pretrained: bool = False
    """Load diffusers' DiTTransformer2DModel and its weights from MODEL."""
    image_size: int = 256
    """Side of the image in pixels."""
    patch_size: int | None = None
    """Side of a patch; default: the one the model's name says."""
    in_channels: int = 4
    """4: VAE latents; 3: RGB pixels."""
    latent_downsample: int | None = None
    """Pixels per input position; default 8 with 4 channels, 1 with 3."""
    num_classes: int = 1000
    """Number of labels, without the null label."""
    hidden_size: int | None = None
    """Width, if not the named model's."""
    depth: int | None = None
    """Number of blocks, if not the named model's."""
    num_heads: int | None = None
    """Attention heads, if not the named model's."""

    @property
    def is_custom(self) -> bool:
        """Whether `model` is ``module:callable``."""
        return is_custom(self.model, self.pretrained)

    def experiment(self) -> ExperimentConfig:
        """Return the model's part as an experiment, which validates it.

        Raises:
            UsageError: Unknown model, or sizes that do not fit.
        """
        names = {field.name for field in fields(self)} & {field.name for field in fields(ExperimentConfig)}
        given = {name: getattr(self, name) for name in names}
        return ExperimentConfig(
            experiment="vanilla", **{name: value for name, value in given.items() if value is not None}
        )

    def check_model(self, *, kept: Collection[str]) -> None:
        """Check the model and its sizes.

        Args:
            kept: Options that mean something for a model of the user's own.

        Raises:
            UsageError: They are wrong, or an option was given that somebody else decides.
        """
        if not self.is_custom:
            self.experiment()
            if self.pretrained:
                self._refuse(("hidden_size", "depth", "num_heads"), "the checkpoint")
            return
        check_spec(self.model)
        self._refuse([field.name for field in fields(self) if field.name not in ("model", *kept)], self.model)

    def _refuse(self, names: Iterable[str], owner: str) -> None:
        """Raise `UsageError` if one of these options was given, although somebody else decides it."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                fix = f"{owner} decides it; drop the option"
                raise UsageError.for_value(name, getattr(self, name), "no value", fix)
