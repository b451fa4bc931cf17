import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp.errors import UsageError
from dit_dp.models import DiT, DiTwDDTHead, DualStreamDiT
from dit_dp.models.attention import Attention
from dit_dp.models.ddt import GaussianFourierEmbedding, RotaryPositions
from dit_dp.models.dit import randomize_zero_init_
from dit_dp.objectives import Objective
from tests.workload_models import CASES, DIT, build, ddt, draw, panda, sets, x2


def outputs(model: nn.Module, objective: Objective, batch: dict[str, Tensor]) -> Tensor:
    """Return the prediction that an objective is given."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    objective(model, batch)
    handle.remove()
    return seen[0]


def doubled(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    batch = {key: v.double() if v.is_floating_point() else v for key, v in draw(name)[1].items()}
    return build(name).double(), batch


@pytest.mark.parametrize("name", CASES)
def test_shape_and_no_randomness_in_the_forward(name: str) -> None:
    model, (objective, batch, _) = build(name), draw(name)
    state = torch.get_rng_state()
    output = outputs(model, objective, batch)
    assert torch.equal(torch.get_rng_state(), state)
    channels = batch["x_t"].shape[1] * (2 if CASES[name][2].learn_sigma else 1)
    assert output.shape == (len(batch["x_t"]), channels, *batch["x_t"].shape[2:])


@pytest.mark.parametrize("name", CASES)
def test_units_do_not_influence_each_other(name: str) -> None:
    model, batch = doubled(name)
    objective, rows = draw(name)[0], CASES[name][2].rows_per_unit
    together = objective(model, batch)
    for unit in range(len(together)):
        part = {key: value[unit * rows : (unit + 1) * rows] for key, value in batch.items()}
        torch.testing.assert_close(objective(model, part), together[unit : unit + 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_float64_copy_is_the_same_function(name: str) -> None:
    """To rounding of a few layers; 3 to 8 epsilons were seen."""
    model, batch = doubled(name)
    objective, single, _ = draw(name)
    exact = outputs(model, objective, batch)
    rounded = outputs(build(name), objective, single)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=100 * 2**-24 * exact.detach().abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_gives_the_same_losses_and_gradients(name: str) -> None:
    objective, batch, _ = draw(name)
    found = []
    for recompute in (False, True):
        model = build(name, activation_checkpointing=recompute)
        losses = objective(model, batch)
        losses.sum().backward()
        found.append((losses, [p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("name", ["ddt", "ddt normed", "x2", "set film"])
def test_runs_in_bf16(name: str) -> None:
    model, (objective, batch, _) = build(name), draw(name)
    full = outputs(model, objective, batch)
    low = {key: v.bfloat16() if v.dim() > 1 and v.is_floating_point() else v for key, v in batch.items()}
    output = outputs(model.bfloat16(), objective, low)
    assert output.dtype == torch.bfloat16
    assert (output.float() - full).norm() < 0.05 * full.norm()


# --- dual stream ----------------------------------------------------------------------------------------------

X2_BATCH = (
    torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 5, 999]),
    torch.arange(3),
)


def awake(model: nn.Module, std: float = 0.1) -> Any:
    return randomize_zero_init_(model, torch.Generator().manual_seed(1), std=std).eval()


def test_a_branch_that_says_nothing_leaves_the_backbone() -> None:
    torch.manual_seed(0)
    plain = awake(DiT(**DIT))
    dual = awake(x2(x2_condition_with_c=True, x2_fuse_every=1))
    dual.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(dual(*X2_BATCH), plain(*X2_BATCH))
    for layer in (dual.x2_proj_out, dual.x2_modulation[1]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.equal(dual(*X2_BATCH), plain(*X2_BATCH))


def test_a_class_token_stands_after_every_four_fine_tokens() -> None:
    model, seen = awake(x2(x2_width=None)), []
    model.x2_vit_block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*X2_BATCH)
    assert seen[0].shape == (3, 5 * 16, 16)
    fine = model.x2_embedder(X2_BATCH[0])
    for token in (0, 7, 15):
        group = seen[0][:, 5 * token : 5 * token + 5]
        assert torch.equal(group[:, :4], fine[:, 4 * token : 4 * token + 4])
        assert torch.equal(group[:, 4], model.x2_cls_tokens[0, token].expand(3, -1))


@pytest.mark.parametrize(("every", "final", "times"), [(0, True, 1), (1, True, 3), (2, False, 1), (2, True, 2)])
def test_where_the_branch_is_added(every: int, final: bool, times: int) -> None:
    model = awake(x2(x2_fuse_every=every, x2_final_fuse=final))
    for block in model.blocks:  # blocks that pass their tokens on
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    seen: list[Tensor] = []
    model.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*X2_BATCH)
    x, t, y = X2_BATCH
    wanted = model.x_embedder(x) + model.pos_embed + times * model.fine_tokens(x, model.condition(t, y))
    torch.testing.assert_close(seen[0], wanted)


def test_a_frozen_backbone_saves_little_unless_the_branch_is_added_inside() -> None:
    def saved(model: DualStreamDiT, train: tuple[str, ...]) -> int:
        kept = {name for group in train for name in model.parameter_groups()[group]}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept)
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*X2_BATCH)
        return count

    full = saved(x2(), ("x2", "head", "backbone"))
    final, inside = saved(x2(), ("x2", "head")), saved(x2(x2_fuse_every=1), ("x2", "head"))
    assert final < inside < full
    assert final < 0.5 * full


# --- DDT ------------------------------------------------------------------------------------------------------


def test_rotations_are_those_of_complex_numbers_by_row_and_column() -> None:
    rope, x = RotaryPositions(8, 3).double(), torch.randn(2, 5, 9, 8, dtype=torch.float64)
    turned = rope(x)
    for row in range(3):
        for column in range(3):
            for pair, (place, power) in enumerate([(row, 0), (row, 1), (column, 0), (column, 1)]):
                angle = place / 10_000 ** (power / 2)
                numbers = torch.view_as_complex(x[:, :, 3 * row + column, 2 * pair : 2 * pair + 2].contiguous())
                wanted = torch.view_as_real(numbers * complex(math.cos(angle), math.sin(angle)))
                # The buffers are of float32.
                torch.testing.assert_close(
                    turned[:, :, 3 * row + column, 2 * pair : 2 * pair + 2], wanted, rtol=0, atol=1e-6
                )


def test_time_features_are_sines_then_cosines_of_fixed_frequencies() -> None:
    embedding, seen = GaussianFourierEmbedding(16), []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.0, 0.3, 1.0])
    embedding(t)
    angles = 2 * math.pi * t[:, None].double() * embedding.W.double()
    torch.testing.assert_close(seen[0].double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-5)
    assert not embedding.W.requires_grad


def test_the_decoder_is_conditioned_token_by_token() -> None:
    """Without mixing in either stream, a token of the output comes from its own token of the input alone."""
    model = awake(ddt())
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    x, t, y = torch.randn(1, 6, 4, 4), torch.tensor([0.5]), torch.tensor([1])
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    moved = (model(changed, t, y) - model(x, t, y)).abs().sum(1)[0] > 0
    assert moved.nonzero().tolist() == [[2, 3]]
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(x, t, y)
    assert seen[0].shape == (1, 16, 24)


def test_ddt_starts_as_the_zero_function() -> None:
    assert not ddt().eval()(torch.randn(2, 6, 4, 4), torch.rand(2), torch.arange(2)).any()


# --- sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["film", "lag"])
@pytest.mark.parametrize("encoder", ["svit", "vit"])
def test_a_row_is_told_about_the_others_of_its_set_and_not_about_itself(encoder: str, conditioning: str) -> None:
    model = awake(sets(encoder=encoder, conditioning=conditioning)).double()
    x, images = torch.randn(2, 2, 3, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([3, 700])
    before, changed = model(x, t, images), images.clone()
    changed[1, 2] += 1
    moved = (model(x, t, changed) - before).abs().flatten(2).amax(2)
    assert (moved[1, :2] > 1e-9).all()
    assert moved[0].max() == 0
    assert moved[1, 2] < 1e-12  # a mean of the others rounds


@pytest.mark.parametrize("conditioning", ["film", "lag"])
@pytest.mark.parametrize("encoder", ["svit", "vit"])
def test_sets_rows_and_given_contexts_are_the_same_thing(encoder: str, conditioning: str) -> None:
    model = awake(sets(encoder=encoder, conditioning=conditioning))
    x, images = torch.randn(2, 2, 3, 3, 8, 8)
    t = torch.tensor([3, 700])
    output = model(x, t, images)
    rows, times = x.flatten(0, 1), t.repeat_interleave(3)
    assert torch.equal(model(rows, times, images.flatten(0, 1)), output.flatten(0, 1))
    others = torch.stack([images[:, [1, 2]], images[:, [0, 2]], images[:, [0, 1]]], 1).flatten(0, 1)
    torch.testing.assert_close(model(rows, times, others), output.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_local_attention_learns_its_temperature_and_no_token_attends_to_itself() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2, local=True).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    assert attention.temperature is not None
    assert attention.temperature.exp().item() == pytest.approx(4**-0.5)
    q, k, v = attention.qkv(x).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-1, -2) * attention.temperature.exp()).masked_fill(
        torch.eye(5, dtype=torch.bool), -math.inf
    )
    wanted = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), wanted)


def test_the_posterior_is_sampled_with_the_batchs_noise_and_says_its_divergence() -> None:
    model = awake(sets(variational=True)).double()
    images, t = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.full((6,), 9)
    noise = torch.randn(6, 16, dtype=torch.float64)
    prediction, kl = model(images, t, images, noise)
    context = model._tokens(images, t)[:, 0]
    mean, log_variance = model.posterior(context).chunk(2, -1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean(1) / math.log(2)
    torch.testing.assert_close(kl, wanted)
    condition = model.dit.condition(t) + mean + (0.5 * log_variance).exp() * noise
    torch.testing.assert_close(prediction, model.dit.denoise(images, condition))


def test_lag_starts_as_the_dit_alone() -> None:
    torch.manual_seed(0)
    lag = awake(sets(conditioning="lag"))
    for block in lag.dit.blocks:
        nn.init.zeros_(block.cross.proj.weight)
        nn.init.zeros_(block.cross.proj.bias)
    plain = DiT(**{**DIT, "in_channels": 3, "num_classes": None, "learn_sigma": False, "mlp_ratio": 3.0})
    assert not plain.load_state_dict(lag.dit.state_dict(), strict=False).missing_keys
    x, t = torch.randn(3, 3, 8, 8), torch.full((3,), 4)
    assert torch.equal(lag(x, t, torch.randn(3, 3, 8, 8)), plain(x, t))


# --- panda ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_panda_block_by_its_formula(by_tokens: bool) -> None:
    torch.manual_seed(0)
    block = panda(scale_by_tokens=by_tokens).blocks[0].double()
    x, c = torch.randn(3, 16, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    parts = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
    m = {name: getattr(block, name)(c)[:, None] for name in parts}
    normed = block.norm1(x) * (1 + m["scale_msa"]) + m["shift_msa"]
    q, k, v = block.attn.qkv(normed).view(3, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(16 if by_tokens else 8)).softmax(-1)
    y = x + m["gate_msa"] * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    hidden = F.relu(block.mlp.fc1(block.norm2(y) * (1 + m["scale_mlp"]) + m["shift_mlp"]))
    torch.testing.assert_close(block(x, c), y + m["gate_mlp"] * block.mlp.fc2(hidden))


def test_pandas_positions_and_modulations_do_not_start_at_zero() -> None:
    model = panda()
    assert model.pos_embed.min() >= 0
    assert model.pos_embed.max() < 1
    assert all(parameter.any() for name, parameter in model.named_parameters() if "norm" not in name)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: x2(patch_size=1), "patch_size: got 1; accepted: a multiple of 2"),
        (lambda: x2(x2_final_fuse=False), "x2_final_fuse: got False; accepted: True; or 1 to 2 for x2_fuse_every"),
        (lambda: x2(x2_final_fuse=False, x2_fuse_every=3), "x2_final_fuse: got False"),
        (lambda: x2(x2_width=13), "x2_width: got 13; accepted: a multiple of 2"),
        (lambda: DiTwDDTHead.from_name("DDT-M"), "model: got 'DDT-M'; accepted: DDT-S, DDT-B, DDT-L, DDT-XL"),
        (lambda: ddt(depth=(1,)), "depth: got .1,.; accepted: two numbers"),
        (lambda: ddt(num_heads=(3, 2)), "hidden_size: got 16; accepted: a multiple of 12"),
        (lambda: ddt(hidden_size=(16, 0)), r"hidden_size\[1\]: got 0"),
        (lambda: ddt(input_size=5, patch_size=2), "input_size: got 5"),
        (lambda: sets(sample_size=1), "sample_size: got 1"),
        (lambda: sets(encoder="cnn"), "encoder: got 'cnn'; accepted: svit, vit"),
        (lambda: sets(conditioning="add"), "conditioning: got 'add'; accepted: film, lag"),
        (lambda: sets(num_heads=3), "hidden_size: got 16; accepted: a multiple of 3"),
        (lambda: panda(patch_size=3), "input_size: got 16; accepted: a multiple of 3"),
    ],
)
def test_bad_sizes_are_named(build_it: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_it()
    assert "\n" not in str(caught.value)


def test_bad_inputs_are_named() -> None:
    model, x, t = sets(), torch.randn(2, 3, 3, 8, 8), torch.tensor([1, 2])
    with pytest.raises(UsageError, match=r"x: got \(2, 4, 3, 8, 8\); accepted: shape \(b, 3, C, H, W\)"):
        model(torch.randn(2, 4, 3, 8, 8), t, torch.randn(2, 4, 3, 8, 8))
    with pytest.raises(UsageError, match=r"x: got 5; accepted: a multiple of 3; .*sample_size=3"):
        model(torch.randn(5, 3, 8, 8), torch.ones(5), torch.randn(5, 3, 8, 8))
    with pytest.raises(UsageError, match=r"images: got \(2, 2, 3, 8, 8\)"):
        model(x, t, x[:, :2])
    with pytest.raises(UsageError, match=r"context_noise: got \(6, 16\); accepted: none"):
        model(x, t, x, torch.randn(6, 16))
    with pytest.raises(UsageError, match=r"context_noise: got None; accepted: shape \(6, 16\)"):
        sets(variational=True)(x, t, x)
    with pytest.raises(UsageError, match="a mask with True"):
        panda()(torch.randn(1, 3, 16, 16), torch.ones(1), torch.zeros(1, dtype=torch.long), torch.tensor([True]))
    with pytest.raises(UsageError, match="y: got None; accepted: a label per example"):
        DiT(**DIT)(torch.randn(1, 4, 8, 8), torch.ones(1))
    with pytest.raises(UsageError, match="no label table"):
        DiT(**{**DIT, "num_classes": None})(torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))
