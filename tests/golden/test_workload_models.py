"""Parameter counts, state-dict names and groups of the models beside DiT: published checkpoints load unchanged."""

from typing import Any

import pytest
import torch
from torch import nn

from dit_dp.errors import UsageError
from dit_dp.models import (
    FAMILIES,
    DiT,
    DiTHuggingFaceWrapper,
    DiTwDDTHead,
    DualStreamDiT,
    PandaDiT,
    SetDiT,
    model_class,
)

COUNTS: dict[str, tuple[Any, int, int]] = {
    "x2": (lambda: DualStreamDiT.from_name("DiT-XL/2"), 690_388_000, 690_093_088),
    "x2 without class tokens": (
        lambda: DualStreamDiT.from_name("DiT-XL/2", x2_use_cls=False),
        690_093_088,
        689_798_176,
    ),
    "DDT-S": (lambda: DiTwDDTHead.from_name("DDT-S"), 23_300_096, 23_201_536),
    "DDT-B": (lambda: DiTwDDTHead.from_name("DDT-B"), 141_273_940, 141_077_076),
    "DDT-L": (lambda: DiTwDDTHead.from_name("DDT-L"), 725_952_256, 725_657_088),
    "DDT-XL": (lambda: DiTwDDTHead.from_name("DDT-XL"), 838_675_796, 838_380_628),
    "set": (SetDiT, 35_641_494, 35_521_686),
    "set, ViT": (lambda: SetDiT(encoder="vit"), 35_619_024, 35_499_216),
    "set, lag": (lambda: SetDiT(conditioning="lag"), 40_909_302, 40_789_494),
    "set, variational": (lambda: SetDiT(variational=True), 36_080_478, 35_960_670),
    "panda": (PandaDiT, 773_344, 773_344),
}
"""Total, and without the fixed positions and frequencies."""

RAE_SHAPES = {
    "pos_embed": (1, 4, 16),
    "x_embedder.proj.weight": (24, 6, 1, 1),
    "x_embedder.proj.bias": (24,),
    "s_embedder.proj.weight": (16, 6, 1, 1),
    "s_embedder.proj.bias": (16,),
    "s_projector.weight": (24, 16),
    "s_projector.bias": (24,),
    "t_embedder.W": (256,),
    "t_embedder.mlp.0.weight": (16, 512),
    "t_embedder.mlp.0.bias": (16,),
    "t_embedder.mlp.2.weight": (16, 16),
    "t_embedder.mlp.2.bias": (16,),
    "y_embedder.embedding_table.weight": (11, 16),
    "final_layer.norm_final.weight": (24,),
    "final_layer.linear.weight": (6, 24),
    "final_layer.linear.bias": (6,),
    "final_layer.adaLN_modulation.1.weight": (48, 24),
    "final_layer.adaLN_modulation.1.bias": (48,),
    "enc_feat_rope.freqs_cos": (4, 8),
    "enc_feat_rope.freqs_sin": (4, 8),
    "dec_feat_rope.freqs_cos": (4, 12),
    "dec_feat_rope.freqs_sin": (4, 12),
} | {
    f"blocks.{block}.{name}": shape
    for block, width, hidden in ((0, 16, 42), (1, 24, 64))
    for name, shape in {
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.w12.weight": (2 * hidden, width),
        "mlp.w12.bias": (2 * hidden,),
        "mlp.w3.weight": (width, hidden),
        "mlp.w3.bias": (width,),
        "adaLN_modulation.1.weight": (6 * width, width),
        "adaLN_modulation.1.bias": (6 * width,),
    }.items()
}
"""`DiTwDDTHead` of bytetriper/RAE with one block a stream."""

TINY_DDT: dict[str, Any] = {
    "input_size": 2,
    "in_channels": 6,
    "hidden_size": (16, 24),
    "depth": (1, 1),
    "num_heads": (2, 2),
    "num_classes": 10,
}


def num_parameters(model: nn.Module, names: list[str] | None = None) -> int:
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() for name in (parameters if names is None else names))


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    build, total, trainable = COUNTS[name]
    with torch.device("meta"):
        model = build()
    assert num_parameters(model) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize(("use_cls", "trainable"), [(True, 17_951_776), (False, 17_656_864)])
def test_what_the_x2_fine_tuning_trains(use_cls: bool, trainable: int) -> None:
    with torch.device("meta"):
        model = DualStreamDiT.from_name("DiT-XL/2", x2_use_cls=use_cls)
    groups = model.parameter_groups()
    assert num_parameters(model, groups["x2"] + groups["head"]) == trainable


def test_backbone_names_of_x2_are_the_reference_dits() -> None:
    sizes: dict[str, Any] = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    plain, dual = DiT(**sizes), DualStreamDiT(**sizes, x2_width=32, x2_num_heads=4)
    missing, unexpected = dual.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    parts = ["x2_embedder.proj", "x2_proj_in", "x2_proj_out", *(f"x2_vit_block.{layer}" for layer in layers)]
    assert set(missing) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")} | {"x2_cls_tokens"}
    assert dual.x2_cls_tokens is not None
    assert dual.x2_cls_tokens.shape == (1, 16, 16)


def test_names_and_shapes_of_ddt_are_raes() -> None:
    model = DiTwDDTHead(**TINY_DDT)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == RAE_SHAPES


def test_names_of_ddts_options() -> None:
    normed = set(DiTwDDTHead(**TINY_DDT, use_qknorm=True).state_dict()) - set(RAE_SHAPES)
    assert normed == {f"blocks.{block}.attn.{norm}.weight" for block in (0, 1) for norm in ("q_norm", "k_norm")}
    plain = set(DiTwDDTHead(**TINY_DDT, use_rmsnorm=False, use_swiglu=False, use_rope=False).state_dict())
    assert not any(".norm" in name or "w12" in name or "rope" in name for name in plain)
    assert "blocks.0.mlp.fc1.weight" in plain
    same_width = DiTwDDTHead(**{**TINY_DDT, "hidden_size": (16, 16), "use_pos_embed": False}).state_dict()
    assert not any(name.startswith("s_projector") or name == "pos_embed" for name in same_width)


GROUPS: dict[str, tuple[Any, dict[str, int], tuple[str, ...]]] = {
    "dit": (
        lambda: DiT(input_size=8, hidden_size=8, depth=1, num_heads=2, num_classes=10),
        {"head": 4, "backbone": 17},
        ("pos_embed",),
    ),
    "ddt": (
        lambda: DiTwDDTHead(**TINY_DDT),
        {"head": 5, "decoder": 16, "encoder": 19},
        ("pos_embed", "t_embedder.W"),
    ),
    "set": (
        lambda: SetDiT(input_size=4, sample_size=3, hidden_size=8, depth=1, num_heads=2, variational=True),
        {"dit": 20, "encoder": 25},
        ("dit.pos_embed",),
    ),
    "diffusers": (
        lambda: DiTHuggingFaceWrapper(
            model_name="DiT-S/2", img_size=64, hidden_size=8, depth=1, num_heads=2, num_classes=10, pretrained=False
        ),
        {"head": 4, "backbone": 17},
        ("model.pos_embed",),
    ),
    "panda": (lambda: PandaDiT(input_size=8, hidden_size=8, depth=1), {"head": 4, "backbone": 38}, ()),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_hold_every_parameter_that_can_train_once(name: str) -> None:
    build, sizes, fixed = GROUPS[name]
    model = build()
    groups = model.parameter_groups()
    assert {group: len(names) for group, names in groups.items()} == sizes
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names))
    everything = dict(model.named_parameters())
    assert set(names) | set(fixed) == set(everything)
    assert all(everything[name].requires_grad != (name in fixed) for name in everything)


def test_every_family_is_a_module() -> None:
    assert all(issubclass(model_class(family), nn.Module) for family in FAMILIES)
    with pytest.raises(UsageError, match="model family: got 'vae'; accepted: dit, diffusers, x2, set, ddt, panda"):
        model_class("vae")
