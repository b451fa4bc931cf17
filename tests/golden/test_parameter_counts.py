"""Parameter counts and state-dict names: what makes a published checkpoint load unchanged."""

import pytest
import torch

from dit_dp.models.dit import DiT
from dit_dp.models.registry import model_names

TOTAL = {
    "DiT-S/2": 32_963_360,
    "DiT-S/4": 32_945_024,
    "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416,
    "DiT-B/4": 130_475_648,
    "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816,
    "DiT-L/4": 458_053_760,
    "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632,
    "DiT-XL/4": 675_074_432,
    "DiT-XL/8": 675_683_072,
}
"""32x32x4 input, 1000 classes, learned variances; the fixed positions included, as published."""

TRAINABLE_P2 = {
    "DiT-S/2": 32_865_056,
    "DiT-B/2": 130_315_808,
    "DiT-L/2": 457_840_672,
    "DiT-XL/2": 674_834_720,
}

DIFFUSERS_XL = 749_826_464

DEPTH_1_SHAPES = {
    "pos_embed": (1, 16, 8),
    "x_embedder.proj.weight": (8, 4, 2, 2),
    "x_embedder.proj.bias": (8,),
    "t_embedder.mlp.0.weight": (8, 256),
    "t_embedder.mlp.0.bias": (8,),
    "t_embedder.mlp.2.weight": (8, 8),
    "t_embedder.mlp.2.bias": (8,),
    "y_embedder.embedding_table.weight": (11, 8),
    "blocks.0.attn.qkv.weight": (24, 8),
    "blocks.0.attn.qkv.bias": (24,),
    "blocks.0.attn.proj.weight": (8, 8),
    "blocks.0.attn.proj.bias": (8,),
    "blocks.0.mlp.fc1.weight": (32, 8),
    "blocks.0.mlp.fc1.bias": (32,),
    "blocks.0.mlp.fc2.weight": (8, 32),
    "blocks.0.mlp.fc2.bias": (8,),
    "blocks.0.adaLN_modulation.1.weight": (48, 8),
    "blocks.0.adaLN_modulation.1.bias": (48,),
    "final_layer.linear.weight": (32, 8),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (16, 8),
    "final_layer.adaLN_modulation.1.bias": (16,),
}


def num_parameters(model: torch.nn.Module, *, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


@pytest.mark.parametrize("name", model_names())
def test_count_and_output_shape(name: str) -> None:
    with torch.device("meta"):
        model = DiT.from_name(name)
        output = model(torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert num_parameters(model) == TOTAL[name]
    assert output.shape == (2, 8, 32, 32)
    assert model.num_tokens == (32 // model.patch_size) ** 2


@pytest.mark.parametrize("name", TRAINABLE_P2)
def test_trainable_count_leaves_out_the_positions(name: str) -> None:
    with torch.device("meta"):
        model = DiT.from_name(name)
    assert num_parameters(model, trainable_only=True) == TRAINABLE_P2[name]


def test_counts_round_to_the_papers() -> None:
    millions = [TOTAL[f"DiT-{size}/2"] / 1e6 for size in ("S", "B", "L", "XL")]
    assert [round(m, d) for m, d in zip(millions, (2, 1, 1, 2), strict=True)] == [32.96, 130.5, 458.1, 675.13]


def test_state_dict_names_and_shapes_are_the_references() -> None:
    model = DiT(input_size=8, hidden_size=8, depth=1, num_heads=2, num_classes=10)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == DEPTH_1_SHAPES


def test_diffusers_xl_has_an_embedder_in_every_block() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs, ours = diffusers.DiTTransformer2DModel(out_channels=8), DiT.from_name("DiT-XL/2")
    embedder = num_parameters(ours.t_embedder) + num_parameters(ours.y_embedder)
    assert num_parameters(theirs) == DIFFUSERS_XL
    assert num_parameters(theirs) == num_parameters(ours, trainable_only=True) + 27 * embedder
