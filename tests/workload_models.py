"""Tiny models of every system, each with its objective, a batch and the map of its rows to privacy units."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.models import DiTwDDTHead, DualStreamDiT, PandaDiT, SetDiT
from dit_dp.models.dit import randomize_zero_init_
from dit_dp.objectives import Objective, ObjectiveConfig

DIT: dict[str, Any] = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
DDT: dict[str, Any] = {"input_size": 4, "in_channels": 6, "hidden_size": (16, 24), "depth": (2, 1), "num_heads": (2, 2)}
SET: dict[str, Any] = {"input_size": 8, "sample_size": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
PANDA: dict[str, Any] = {"input_size": 16, "hidden_size": 8, "depth": 2, "num_heads": 2, "num_classes": 5}
UNITS = 4

_INPUTS = "called with .* inputs, .* Opacus's hooks see one input by position"
_ROWS = "takes every row for an example"
REFUSED: dict[str, dict[str, str]] = {
    "x2": {
        **dict.fromkeys(("opacus", "opacus-functorch", "opacus-ghost"), _INPUTS),
        "opacus-ew": "no rule for DualStr",
    },
    "set": {**dict.fromkeys(("opacus", "opacus-functorch", "opacus-ghost"), _ROWS), "opacus-ew": "no rule for SetEnc"},
    "ddt": {"opacus-ew": "no rule for RMSNorm"},
    "panda": {
        **dict.fromkeys(("opacus", "opacus-functorch", "opacus-ghost"), _INPUTS),
        "opacus-ew": "no rule for Panda",
    },
    "diffusers": {"opacus-ghost": "called more than once", "opacus-ew": "at least two dimensions"},
}
"""By workload, at its authors' options: the peers that refuse it, and what they say."""


def x2(**options: Any) -> DualStreamDiT:
    return DualStreamDiT(**{**DIT, "x2_width": 12, "x2_num_heads": 2, **options})


def ddt(**options: Any) -> DiTwDDTHead:
    return DiTwDDTHead(**{**DDT, "num_classes": 5, **options})


def sets(**options: Any) -> SetDiT:
    return SetDiT(**{**SET, **options})


def panda(**options: Any) -> PandaDiT:
    return PandaDiT(**{**PANDA, **options})


FLOW = ObjectiveConfig(path="flow", target="v", times="logit-normal", shift=2.0, class_dropout_prob=0.5)
EPS = ObjectiveConfig(learn_sigma=True, class_dropout_prob=0.5)
OF_SETS = ObjectiveConfig(set_size=3)

CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], ObjectiveConfig]] = {
    "x2": (x2, {}, EPS),
    "x2 averaged": (
        x2,
        {"x2_use_cls": False, "x2_width": None, "x2_condition_with_c": True, "x2_fuse_every": 1},
        ObjectiveConfig(learn_sigma=True, path="ddpm-cosine", target="v", multiplicity=2),
    ),
    "ddt": (ddt, {}, FLOW),
    "ddt normed": (ddt, {"use_qknorm": True}, ObjectiveConfig(path="additive", multiplicity=2)),
    "ddt plain": (ddt, {"use_qknorm": True, "use_rmsnorm": False, "use_swiglu": False, "use_rope": False}, FLOW),
    "set film": (sets, {}, OF_SETS),
    "set lag": (sets, {"encoder": "vit", "conditioning": "lag"}, OF_SETS),
    "set variational": (
        sets,
        {"conditioning": "lag", "variational": True},
        ObjectiveConfig(set_size=3, context_shape=(16, 16), multiplicity=2),
    ),
    "panda": (panda, {}, ObjectiveConfig(metric="l1", class_dropout_prob=None)),
    "panda by tokens": (panda, {"scale_by_tokens": True}, ObjectiveConfig(class_dropout_prob=None, target="x0")),
}


def build(name: str, **more: Any) -> nn.Module:
    """Return a case's model, in training mode, with what starts at zero made random."""
    torch.manual_seed(0)
    make, options, _ = CASES[name]
    return randomize_zero_init_(make(**options, **more).train(), torch.Generator().manual_seed(1), std=0.1)


def draw(name: str, units: int = UNITS) -> tuple[Objective, dict[str, Tensor], Tensor | None]:
    """Return a case's objective, a batch of units whose data and noise differ in size, and the map of its rows."""
    config = CASES[name][2]
    model, objective = CASES[name][0](**CASES[name][1]), Objective(config)
    generator = torch.Generator().manual_seed(2)
    shape = (model.in_channels, model.input_size, model.input_size)
    shape = shape if config.set_size is None else (config.set_size, *shape)
    size = torch.logspace(-0.7, 0.7, units)
    x0 = torch.randn(units, *shape, generator=generator) * size.view(-1, *[1] * len(shape))
    labels = torch.randint(0, 5, (units,), generator=generator) if config.set_size is None else None
    batch = objective.draw(x0, labels, generator)
    batch["noise"] *= size.repeat_interleave(config.rows_per_unit).view(-1, 1, 1, 1)
    batch["x_t"] = objective.diffuse(batch["x0"], batch["noise"], batch["t"])
    return objective, batch, objective.row_to_unit(batch)
