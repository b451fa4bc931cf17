"""One front door to a DiT: the custom model of a named architecture, or diffusers' with its weights.

Shapes: N examples, C input channels, O output channels, H = W positions of the input, K classes.

A model that cannot be had raises; no other model is ever put in its place.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp import validate
from dit_dp.errors import UsageError
from dit_dp.models.blocks import named_groups
from dit_dp.models.dit import DiT
from dit_dp.models.embedders import check_batch, check_dropout, select_labels
from dit_dp.models.registry import LATENT_DOWNSAMPLE, MODELS
from dit_dp.models.weights import use_reference_numerics_

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
_DEFAULT_NAME = "facebook/DiT-XL-2-256"


class DiTHuggingFaceWrapper(nn.Module):
    """A DiT by name, custom or pretrained, behind one `forward`.

    Args:
        model_name: With `pretrained=False` an architecture: ``facebook/DiT-XL-2-256``, ``DiT-S/2``. With
            `pretrained=True` a hub name (a pipeline repository with a ``transformer`` folder) or a local
            folder holding the model or such a pipeline.
        img_size: Side of the image in pixels. The model sees `img_size / latent_downsample` positions.
        patch_size: Side of a patch; `None`: the name's or the checkpoint's.
        in_channels: 3 (pixels) or 4 (VAE latents); 4 when pretrained.
        num_classes: K, without the null label.
        pretrained: Load diffusers' `DiTTransformer2DModel` and its weights.
        latent_downsample: Pixels per input position; `None`: 8 with 4 channels, 1 with 3.
        depth: Number of blocks; `None`: the name's or the checkpoint's. So are the next two.
        hidden_size: D.
        num_heads: Attention heads.
        class_dropout_prob: Chance that a label is dropped in training, drawn once per example.
        learn_sigma: Whether O is 2C; `None`: true, or the checkpoint's.
        activation_checkpointing: Recompute each block in the backward pass.
        reference_numerics: Give diffusers' model the reference's two constants, which make it the function
            that the published weights were trained as; see `use_reference_numerics_`.

    Attributes:
        model: The `DiT` or diffusers' model. Every parameter but fixed positions is trainable; in diffusers'
            model each block has its own embedder, and block 0's runs twice in a forward.
        img_size: As given.
        latent_size: H = W, side of the model's input in positions.
        patch_size: p.
        in_channels: C.
        out_channels: O, channels of the prediction.
        learn_sigma: Whether O is 2C.
        num_classes: K, which is also the null label.

    Raises:
        UsageError: A size that does not fit or contradicts the checkpoint, or a checkpoint that cannot be
            loaded completely; one line with the cause.
    """

    def __init__(
        self,
        model_name: str = _DEFAULT_NAME,
        img_size: int = 256,
        patch_size: int | None = None,
        in_channels: int = 4,
        num_classes: int = 1000,
        pretrained: bool = False,
        *,
        latent_downsample: int | None = None,
        depth: int | None = None,
        hidden_size: int | None = None,
        num_heads: int | None = None,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool | None = None,
        activation_checkpointing: bool = False,
        reference_numerics: bool = False,
    ) -> None:
        super().__init__()
        check_dropout(class_dropout_prob)
        self.pretrained, self.class_dropout_prob = pretrained, class_dropout_prob
        self.img_size, self.in_channels, self.num_classes = img_size, in_channels, num_classes
        self.latent_size = _latent_size(img_size, in_channels, latent_downsample, pretrained)
        sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size}
        given = {name: value for name, value in sizes.items() if value is not None}
        self.model: nn.Module
        if pretrained:
            self._load_model(model_name, learn_sigma, given, reference_numerics)
            if activation_checkpointing:
                self.model.enable_gradient_checkpointing()
        else:
            self.model = DiT.from_name(
                model_name,
                input_size=self.latent_size,
                in_channels=in_channels,
                num_classes=num_classes,
                class_dropout_prob=class_dropout_prob,
                learn_sigma=learn_sigma is not False,
                activation_checkpointing=activation_checkpointing,
                **given,
            )
            self.patch_size, self.out_channels = self.model.patch_size, self.model.out_channels
        self.learn_sigma = self.out_channels == 2 * in_channels

    def _load_model(
        self, model_name: str, learn_sigma: bool | None, sizes: dict[str, int], reference_numerics: bool
    ) -> None:
        """Load diffusers' model, refusing what contradicts the arguments, and take label dropout from it."""
        expected = {"num_classes": self.num_classes, "in_channels": self.in_channels, **sizes}
        if learn_sigma is not None:
            expected["out_channels"] = self.in_channels * (2 if learn_sigma else 1)
        checkpoint = _Checkpoint(model_name)
        checkpoint.check_sizes(self.img_size, self.latent_size, expected)
        self.model = checkpoint.load()
        self.patch_size, self.out_channels = checkpoint.sizes["patch_size"], checkpoint.sizes["out_channels"]
        for name, module in self.model.named_modules():
            if name.endswith(".class_embedder"):
                module.dropout_prob = 0.0
        if reference_numerics:
            use_reference_numerics_(self.model)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens the blocks see."""
        return int(self.latent_size // self.patch_size) ** 2

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of all parameters but fixed positions, by the part of the model they belong to."""
        head = ("model.final_layer.", "model.proj_out_")
        return named_groups(self, {"head": head, "backbone": ("",)}, fixed=("model.pos_embed",))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        target_noise: Tensor | None = None,
        drop_labels: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Predict the noise of a noisy input; with the true noise, also the loss of each example.

        Args:
            x: Noisy input, (N, C, H, W), of the parameters' dtype.
            t: Times, (N,).
            y: Labels, (N,), integer.
            target_noise: The noise in `x`, (N, C, H, W).
            drop_labels: Which labels to drop, (N,), bool; nothing is drawn then. `None`: drawn once per
                example in training, none in evaluation.

        Returns:
            The prediction, (N, O, H, W), whose first C channels are the noise. With `target_noise` a dict:
            `loss`, (N,), each example's mean squared error over those C channels, at least float32; and
            `logits`, the prediction.

        Raises:
            UsageError: A tensor of the wrong shape.
        """
        if self.pretrained:
            check_batch(x, t, y, self.in_channels, self.latent_size)
            labels = select_labels(
                y,
                drop_labels,
                probability=self.class_dropout_prob,
                training=self.training,
                null_label=self.num_classes,
            )
            prediction: Tensor = self.model(x, timestep=t, class_labels=labels, return_dict=False)[0]
        else:
            prediction = self.model(x, t, y, drop_labels)
        if target_noise is None:
            return prediction
        if target_noise.shape != x.shape:
            raise UsageError.for_value(
                "target_noise", tuple(target_noise.shape), f"shape {tuple(x.shape)}, the shape of x"
            )
        error = prediction[:, : self.in_channels] - target_noise  # (N, C, H, W)
        error = error.to(torch.promote_types(error.dtype, torch.float32))
        return {"loss": error.square().flatten(1).mean(dim=1), "logits": prediction}


class _Checkpoint:
    """Weights of diffusers' `DiTTransformer2DModel`, on the hub or in a folder; imports diffusers."""

    def __init__(self, model_name: str) -> None:
        """Find it and read its sizes; no weights yet."""
        self.name = model_name
        self._source, self._options = _locate(model_name)
        self._class = _import_model_class()
        try:
            config = self._class.load_config(self._source, **self._options)
        except OSError as error:
            raise self._error(error) from error
        if config.get("_class_name") not in _CLASSES:
            found = config.get("_class_name")
            raise UsageError(f"model_name: {model_name!r} holds a {found}; accepted: a {_CLASSES[0]}")
        parameters = inspect.signature(self._class.__init__).parameters
        config = {**{name: parameter.default for name, parameter in parameters.items()}, **config}
        out_channels = config["out_channels"]
        self.sizes: dict[str, int] = {
            "depth": config["num_layers"],
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "num_heads": config["num_attention_heads"],
            "patch_size": config["patch_size"],
            "in_channels": config["in_channels"],
            "out_channels": config["in_channels"] if out_channels is None else out_channels,
            "num_classes": config["num_embeds_ada_norm"],
            "latent_size": config["sample_size"],
        }

    def check_sizes(self, img_size: int, latent_size: int, expected: dict[str, int]) -> None:
        """Raise `UsageError` naming the first argument that contradicts the checkpoint."""
        for name, value in expected.items():
            if value != self.sizes[name]:
                raise UsageError.for_value(name, value, f"{self.sizes[name]}, as in the checkpoint {self.name}")
        if latent_size != self.sizes["latent_size"]:
            there = self.sizes["latent_size"]
            raise UsageError.for_value(
                "img_size",
                img_size,
                f"{there * img_size // latent_size}, as in the checkpoint {self.name} (sample_size {there}, "
                f"not {latent_size})",
            )

    def load(self) -> nn.Module:
        """Return the model in training mode, every weight from the checkpoint."""
        try:
            model, report = self._class.from_pretrained(
                self._source, output_loading_info=True, low_cpu_mem_usage=False, **self._options
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise self._error(error) from error
        # diffusers only logs a weight that is missing, and leaves it random.
        problems = [f"{kind.replace('_', ' ')} {names[:3]}" for kind, names in report.items() if names]
        if problems:
            raise UsageError(f"model_name: {self.name!r} does not fit the model: {'; '.join(problems)}")
        loaded: nn.Module = model.train()
        return loaded

    def _error(self, error: BaseException) -> UsageError:
        """Return the one-line error for a failed load, with the cause at the bottom of the chain."""
        root = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__ or root
        causes = dict.fromkeys(" ".join(str(e).split()) for e in (error, root))
        return UsageError(
            f"model_name: cannot load {self.name!r}: {'; '.join(causes)}; accepted: a hub name that can be "
            "reached, a local folder, or pretrained=False"
        )


def _latent_size(img_size: int, in_channels: int, downsample: int | None, pretrained: bool) -> int:
    """Return the side of the model's input in positions, or raise `UsageError`."""
    validate.integer("img_size", img_size)
    if pretrained and in_channels != 4:
        raise UsageError.for_value("in_channels", in_channels, "4", "set pretrained=False, or use 4-channel latents")
    if in_channels not in (3, 4):
        raise UsageError.for_value("in_channels", in_channels, "3 (pixels), 4 (VAE latents)")
    if downsample is None:
        downsample = LATENT_DOWNSAMPLE if in_channels == 4 else 1
    validate.integer("latent_downsample", downsample)
    validate.divisible("img_size", img_size, downsample, f"a position covers {downsample} pixels")
    return img_size // downsample


def _locate(model_name: str) -> tuple[str, dict[str, str]]:
    """Return what diffusers is to load and with which options: a folder if there is one, else a hub name."""
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        for place, options in ((folder, {}), (folder / "transformer", {"subfolder": "transformer"})):
            if (place / "config.json").is_file():
                return str(folder), options
        raise UsageError.for_value("model_name", model_name, "a folder with config.json or transformer/config.json")
    is_architecture = model_name.partition("/")[0] in MODELS
    if is_architecture or not _HUB_NAME.fullmatch(model_name) or model_name.startswith("."):
        raise UsageError.for_value(
            "model_name",
            model_name,
            f"with pretrained=True a hub name ({_DEFAULT_NAME}) or an existing folder",
            "or set pretrained=False to train this architecture from scratch" if is_architecture else None,
        )
    return model_name, {"subfolder": "transformer"}


def _import_model_class() -> Any:
    """Return diffusers' model class; only pretrained models need diffusers."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise UsageError(
            f"pretrained: got True, but diffusers cannot be imported ({cause}); pip install diffusers, "
            "or set pretrained=False"
        ) from error
    return DiTTransformer2DModel
