"""What the profile of norm rules counts, and that it times both rules of one gradient."""

import pytest
import torch

from dit_dp.clipping.contributions import Outer
from memory_test.diffusion_profile.norm_rules import Layer, layers_of, modulation_of, timed
from memory_test.inspection.args import InspectArgs
from memory_test.inspection.inspection import inspect_model
from memory_test.inspection.subject import build_subject


def test_layers_are_those_that_train_as_they_are_called() -> None:
    found = {layer.name: layer for layer in layers_of(inspect_model(build_subject(InspectArgs(workload="panda"))))}
    assert found["blocks.0.attn.qkv"] == Layer("blocks.0.attn.qkv", 4096, 64, 1152)
    assert found["x_embedder.proj"] == Layer("x_embedder.proj", 4096, 3 * 4 * 4, 48)
    assert found["blocks.2.gate_mlp"] == Layer("blocks.2.gate_mlp", 1, 64, 64)
    assert len(found) == 37
    assert modulation_of(found.values()) == {"layers": 0, "training": 0, "output_bytes": 0}


def test_multiply_adds() -> None:
    costs = Layer("x", 256, 1152, 4608).multiply_adds
    assert costs["training"] == 3 * 256 * 1152 * 4608
    assert costs["direct"] == costs["training"] / 3
    assert costs["cheaper"] == costs["ghost"] == pytest.approx(0.5625 * 256**2 * 5760)
    assert Layer("x", 4096, 64, 64).multiply_adds["cheaper"] == 4096 * 64 * 64
    assert Layer("x", 1, 3, 4).multiply_adds == {"training": 36, "ghost": 7, "direct": 7, "cheaper": 7}
    token = modulation_of(
        [Layer("blocks.0.adaLN_modulation.1", 16, 8, 48), Layer("blocks.1.adaLN_modulation.1", 1, 8, 48)]
    )
    assert token == {"layers": 1, "training": 3 * 16 * 8 * 48, "output_bytes": 4 * 16 * 48}


def test_both_rules_give_one_norm_and_are_timed() -> None:
    found = timed(Layer("x", 32, 8, 24))
    assert [len(found["seconds"][rule]) for rule in ("ghost", "direct")] == [9, 9]
    assert found["ghost_over_direct"]["median"] > 0
    a, g = torch.randn(2, 32, 8), torch.randn(2, 32, 24)
    torch.testing.assert_close(Outer(a, g).squared_norms("ghost"), Outer(a, g).squared_norms("direct"))
