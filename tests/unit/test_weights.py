from typing import Any

import pytest
import torch

from dit_dp.errors import UsageError
from dit_dp.models.dit import DiT, randomize_zero_init_
from dit_dp.models.weights import diffusers_to_reference, reference_to_diffusers, use_reference_numerics_
from tests.models import DIFFUSERS

SIZES = {"depth": 2, "hidden_size": 16, "num_heads": 2}


def reference() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, num_classes=10, **SIZES)
    randomize_zero_init_(model, torch.Generator().manual_seed(0), std=0.1)
    return model.double().eval()


def stock_diffusers() -> Any:
    return pytest.importorskip("diffusers").DiTTransformer2DModel(**DIFFUSERS)


def test_same_weights_same_output_under_the_references_numerics() -> None:
    ours = reference()
    theirs = stock_diffusers().double().eval()
    theirs.load_state_dict(reference_to_diffusers(ours.state_dict()))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([1, 2, 10])
    expected = ours(x, t, y)

    def relative_error() -> float:
        return ((theirs(x, t, y).sample - expected).norm() / expected.norm()).item()

    stock = relative_error()
    for block in theirs.transformer_blocks:
        block.norm3.eps = 1e-6
    spacing_alone = relative_error()
    use_reference_numerics_(theirs)
    exact = relative_error()
    for block in theirs.transformer_blocks:
        block.norm3.eps = 1e-5
    epsilon_alone = relative_error()
    assert exact < 1e-15
    # Either constant alone is off by far more than rounding; the spacing matters most, and the stock model,
    # with both, is visibly another function.
    assert epsilon_alone > 1e-9
    assert spacing_alone > 1e-3
    assert stock > 1e-3


def test_positions_agree_exactly() -> None:
    theirs = stock_diffusers()
    assert "pos_embed.pos_embed" not in theirs.state_dict()
    assert torch.equal(theirs.pos_embed.pos_embed, DiT(input_size=8, num_classes=10, **SIZES).pos_embed)


def test_there_and_back_is_the_identity_and_shares_no_memory() -> None:
    weights = reference().state_dict()
    there = reference_to_diffusers(weights)
    back = diffusers_to_reference(there, latent_size=8)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    tensors = [*weights.values(), *there.values(), *back.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("part", ["timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"])
def test_embedders_that_differ_are_refused_by_block(part: str) -> None:
    there = reference_to_diffusers(reference().state_dict())
    there[f"transformer_blocks.1.norm1.emb.{part}"][0] += 1
    with pytest.raises(UsageError, match=rf"{part} of transformer_blocks\.1\.norm1\.emb differs") as caught:
        diffusers_to_reference(there, latent_size=8)
    assert "\n" not in str(caught.value)


def test_missing_unknown_and_foreign_names_are_refused() -> None:
    weights = reference().state_dict()
    there = reference_to_diffusers(weights)
    with pytest.raises(UsageError, match=r"'blocks\.1\.mlp\.fc2\.bias'"):
        reference_to_diffusers({k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.bias"})
    with pytest.raises(UsageError, match=r"without a counterpart in a DiT: x2_embedder"):
        reference_to_diffusers({**weights, "x2_embedder": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"'transformer_blocks\.0\.attn1\.to_q\.bias'"):
        diffusers_to_reference({k: v for k, v in there.items() if "to_q.bias" not in k}, latent_size=8)
    with pytest.raises(UsageError, match=r"names that begin with blocks\.0"):
        reference_to_diffusers(there)


def test_trained_positions_are_refused() -> None:
    weights = reference().state_dict()
    weights["pos_embed"] = weights["pos_embed"] + 0.1
    with pytest.raises(UsageError, match="pos_embed is not the fixed sine-cosine table"):
        reference_to_diffusers(weights)
