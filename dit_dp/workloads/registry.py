"""Every system as plain data: model, objective, what trains, unit, sampler and front-end. No torch.

A workload says what is trained; a method says how its gradient is made private. Neither knows the other's names.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dit_dp.models.registry import DDT_SIZES, MODELS
from dit_dp.objectives.config import ObjectiveConfig

Sampler = Literal["ancestral", "ddim", "euler"]
Frontend = Literal["vae", "rae"]
Unit = Literal["image", "set"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One system, at the settings of its authors.

    Attributes:
        summary: In a line.
        family: Key of `dit_dp.models.FAMILIES`.
        sizes: Arguments of the model by the name of its size.
        model: Name of the default size.
        patch_size: Where the model's name says none.
        image_size: Side of the image in pixels.
        in_channels: Of the model's input.
        downsample: Pixels per input position, by number of input channels; others: 1.
        num_classes: Number of labels; `None`: the model takes none.
        options: The model's further arguments, with their defaults.
        objective: What it is trained on.
        shifts_by_size: Whether times are shifted for the number of dimensions, `shift_for`, unless asked otherwise.
        train: Preset of `dit_dp.training.PRESETS`.
        sampler: How samples are drawn, unless asked otherwise.
        sampling_steps: Of the sampler.
        frontend: Frozen encoder between images and the model's input, where its channels are the encoder's.
        optimizer: Key of `dit_dp.training.step.OPTIMIZERS`.
        learning_rate: Step size.
        betas: Of Adam and AdamW.
        ema_decay: Of the average that samples are drawn from.
    """

    summary: str
    family: str
    sizes: Mapping[str, Mapping[str, Any]]
    model: str
    patch_size: int = 2
    image_size: int = 256
    in_channels: int = 4
    downsample: Mapping[int, int] = field(default_factory=dict)
    num_classes: int | None = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    shifts_by_size: bool = False
    train: str = "full"
    sampler: Sampler = "ancestral"
    sampling_steps: int = 250
    frontend: Frontend | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.9999

    @property
    def unit(self) -> Unit:
        """What one privacy unit is: ``image`` or ``set``."""
        return "image" if self.objective.set_size is None else "set"


DIT_SIZES = {name: asdict(size) for name, size in MODELS.items()}
"""Sizes that are named as DiT's are, by `dit_dp.models.parse_model_name`."""

_VAE = {4: 8}
_RAE_CHANNELS = 768

WORKLOADS: dict[str, Workload] = {
    "dit": Workload(
        summary="DiT on latents or pixels (arXiv 2212.09748)",
        family="dit",
        sizes=DIT_SIZES,
        model="DiT-XL/2",
        downsample=_VAE,
        options={"mlp_ratio": 4.0, "condition_init": "reference"},
        objective=ObjectiveConfig(learn_sigma=True),
        frontend="vae",
    ),
    "diffusers": Workload(
        summary="diffusers' DiTTransformer2DModel with its weights, from a hub name or a local folder",
        family="diffusers",
        sizes={},
        model="facebook/DiT-XL-2-256",
        downsample=_VAE,
        objective=ObjectiveConfig(learn_sigma=True),
        frontend="vae",
    ),
    "x2": Workload(
        summary="a second stream of finer patches, trained on a frozen DiT",
        family="x2",
        sizes=DIT_SIZES,
        model="DiT-XL/2",
        downsample=_VAE,
        options={
            "mlp_ratio": 4.0,
            "x2_width": 1024,
            "x2_num_heads": 16,
            "x2_mlp_ratio": 4.0,
            "x2_norm_eps": 1e-6,
            "x2_use_cls": True,
            "x2_fuse_every": 0,
            "x2_final_fuse": True,
            "x2_condition_with_c": False,
        },
        objective=ObjectiveConfig(learn_sigma=True),
        train="x2",
        frontend="vae",
    ),
    "set": Workload(
        summary="sets of one class: each image from an encoder's view of the others",
        family="set",
        sizes={"Set": {"depth": 6, "hidden_size": 468, "num_heads": 9}},
        model="Set/2",
        image_size=32,
        in_channels=3,
        num_classes=None,
        options={
            "mlp_ratio": 3.0,
            "sample_size": 6,
            "encoder": "svit",
            "encoder_depth": None,
            "conditioning": "film",
            "variational": False,
        },
        objective=ObjectiveConfig(set_size=6, class_dropout_prob=None),
        sampler="ddim",
        sampling_steps=100,
    ),
    "ddt": Workload(
        summary="DiT with a wide head on the latents of a representation autoencoder",
        family="ddt",
        sizes={name: asdict(size) for name, size in DDT_SIZES.items()},
        model="DDT-XL/1",
        patch_size=1,
        image_size=224,
        in_channels=_RAE_CHANNELS,
        downsample={_RAE_CHANNELS: 14},
        options={
            "mlp_ratio": 4.0,
            "use_qknorm": False,
            "use_swiglu": True,
            "use_rope": True,
            "use_rmsnorm": True,
            "use_pos_embed": True,
        },
        objective=ObjectiveConfig(path="flow", target="v", times="logit-normal"),
        shifts_by_size=True,
        sampler="euler",
        sampling_steps=50,
        frontend="rae",
        learning_rate=2e-4,
        betas=(0.9, 0.95),
        ema_decay=0.9995,
    ),
    "panda": Workload(
        summary="a small DiT on the pixels of one class",
        family="panda",
        sizes={"Panda": {"depth": 3, "hidden_size": 64, "num_heads": 6}},
        model="Panda/4",
        patch_size=4,
        in_channels=3,
        num_classes=1,
        options={"mlp_ratio": 4.0, "scale_by_tokens": False},
        objective=ObjectiveConfig(metric="l1", class_dropout_prob=None),
        sampling_steps=1000,
        optimizer="adam",
        learning_rate=1e-6,
    ),
}
"""Every workload by its name."""
