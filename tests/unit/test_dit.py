import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dit_dp.errors import UsageError
from dit_dp.models import DiT as LazyDiT
from dit_dp.models.dit import DiT, randomize_zero_init_
from dit_dp.models.embedders import select_labels, sincos_positions, time_sinusoid

TINY: dict[str, Any] = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def tiny(seed: int = 0, **overrides: Any) -> DiT:
    torch.manual_seed(seed)
    model = DiT(**{**TINY, **overrides})
    randomize_zero_init_(model, torch.Generator().manual_seed(seed), std=0.1)
    return model


def make_batch(channels: int = 4, size: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 500, 999]), torch.tensor([1, 2, 9]), torch.tensor([True, False, False])


def gradients(model: DiT, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(*batch).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_package_exports_the_model() -> None:
    assert LazyDiT is DiT


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize(("channels", "learn_sigma"), [(3, True), (4, True), (4, False)])
def test_output_shape(patch_size: int, channels: int, learn_sigma: bool) -> None:
    model = tiny(patch_size=patch_size, in_channels=channels, learn_sigma=learn_sigma)
    output = model(*make_batch(channels))
    assert output.shape == (3, channels * (1 + learn_sigma), 8, 8)


def test_a_patch_of_the_output_comes_from_its_own_token() -> None:
    model = tiny(depth=1)
    patches = torch.arange(16 * 32, dtype=torch.float32).reshape(1, 16, 32)  # (1, T, p*p*O)
    image = model.unpatchify(patches)
    for row, column, channel in [(0, 0, 0), (3, 6, 5), (7, 1, 7)]:
        token = (row // 2) * 4 + column // 2
        within = ((row % 2) * 2 + column % 2) * 8 + channel
        assert image[0, channel, row, column] == patches[0, token, within]


def test_starts_as_the_zero_function_and_randomizing_wakes_every_gradient() -> None:
    torch.manual_seed(0)
    model = DiT(**TINY)
    assert not model(*make_batch()).any()
    randomize_zero_init_(model, torch.Generator().manual_seed(0))
    assert all(g.any() for g in gradients(model, make_batch()).values())


def test_initialisation_is_the_references() -> None:
    torch.manual_seed(0)
    model = DiT(**{**TINY, "hidden_size": 64})
    for name, value in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name or name.endswith("bias"):
            assert not value.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert value.std().item() == pytest.approx(0.02, rel=0.2), name
        elif value.requires_grad:
            bound = math.sqrt(6 / (value[0].numel() + value.shape[0]))
            assert 0.9 * bound < value.abs().max().item() <= bound, name


def test_conditions_may_start_apart_and_the_rest_as_ever() -> None:
    torch.manual_seed(0)
    model = DiT(**{**TINY, "hidden_size": 64, "num_classes": 30, "condition_init": "unit"})
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(1, rel=0.1)
    for place in (0, 2):
        weight = model.get_parameter(f"t_embedder.mlp.{place}.weight")
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max().item() <= bound
    assert not model.final_layer.linear.weight.any()
    with pytest.raises(UsageError, match="condition_init: got 'zero'; accepted: reference, unit"):
        DiT(**{**TINY, "condition_init": "zero"})


def test_randomizing_depends_on_the_generator_alone_and_not_on_dtype() -> None:
    single, double = DiT(**TINY), DiT(**TINY).double()
    for model in (single, double):
        randomize_zero_init_(model, torch.Generator().manual_seed(3))
    torch.testing.assert_close(single.final_layer.linear.weight.double(), double.final_layer.linear.weight)


def test_positions_are_fixed_and_separate_rows_from_columns() -> None:
    model = tiny()
    assert not model.pos_embed.requires_grad
    table = sincos_positions(16, 4).reshape(4, 4, 2, 2, 4)  # row, column, half of D, sine/cosine, frequency
    for row in range(4):
        for column in range(4):
            for half, position in ((0, column), (1, row)):
                angles = [position / 10_000 ** (k / 4) for k in range(4)]
                expected = [[math.sin(a) for a in angles], [math.cos(a) for a in angles]]
                torch.testing.assert_close(table[row, column, half], torch.tensor(expected))


def test_time_features_are_cosines_then_sines_in_float32_for_any_dtype() -> None:
    features = time_sinusoid(torch.tensor([3], dtype=torch.int64))
    assert features.dtype == torch.float32
    assert features.shape == (1, 256)
    assert torch.equal(features, time_sinusoid(torch.tensor([3.0], dtype=torch.float64)))
    angles = [3 * 10_000 ** (-k / 128) for k in range(128)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(features[0], torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_float64_copy_is_the_same_function() -> None:
    model = tiny()
    x, t, y, drop = make_batch()
    double = copy.deepcopy(model).double()(x.double(), t, y, drop)
    assert double.dtype == torch.float64
    # Rounding of float32 through two blocks: a few hundred epsilons of outputs of order one.
    torch.testing.assert_close(model(x, t, y, drop).double(), double, rtol=0, atol=500 * 2**-24)


def test_labels_are_drawn_once_per_example_in_training_only() -> None:
    y = torch.arange(20_000) % 10
    torch.manual_seed(0)
    kept = select_labels(y, None, probability=0.25, training=True, null_label=10)
    dropped = kept == 10
    assert torch.equal(kept[~dropped], y[~dropped])
    # Five standard deviations of a mean of 20,000 draws.
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 20_000))
    assert torch.equal(select_labels(y, None, probability=0.25, training=False, null_label=10), y)


def test_training_without_a_mask_takes_exactly_one_draw_per_example() -> None:
    model, (x, t, y, _) = tiny(class_dropout_prob=0.5), make_batch()
    torch.manual_seed(7)
    drawn = torch.rand(3) < 0.5
    after = torch.rand(1)
    torch.manual_seed(7)
    output = model(x, t, y)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(output, model(x, t, y, drawn))


def test_a_given_mask_is_obeyed_without_drawing_in_training_and_evaluation() -> None:
    model, (x, t, y, drop) = tiny(class_dropout_prob=0.9), make_batch()
    state = torch.get_rng_state()
    trained, evaluated = model(x, t, y, drop), model.eval()(x, t, y, drop)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, evaluated)
    assert torch.equal(evaluated, model(x, t, torch.where(drop, 10, y)))
    assert not torch.equal(evaluated, model(x, t, y))


def test_no_dropout_means_no_null_row_and_no_drops() -> None:
    model, (x, t, y, drop) = tiny(class_dropout_prob=0.0), make_batch()
    assert model.y_embedder.embedding_table.num_embeddings == 10
    assert torch.equal(model(x, t, y, torch.zeros_like(drop)), model(x, t, y))
    with pytest.raises(UsageError, match="class_dropout_prob > 0"):
        model(x, t, y, drop)


def test_examples_do_not_influence_each_other() -> None:
    model, (x, t, y, drop) = tiny().double(), make_batch(dtype=torch.float64)
    together = model(x, t, y, drop)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(model(x[one], t[one], y[one], drop[one]), together[one], rtol=0, atol=1e-14)


def test_checkpointing_gives_the_same_output_and_gradients() -> None:
    plain, recomputed = tiny(), tiny(activation_checkpointing=True)
    batch = make_batch()
    assert torch.equal(plain(*batch), recomputed(*batch))
    theirs = gradients(plain, batch)
    assert all(torch.equal(g, theirs[name]) for name, g in gradients(recomputed, batch).items())


def test_runs_under_bf16_autocast_and_in_bf16() -> None:
    model, (x, t, y, drop) = tiny(), make_batch()
    full = model(x, t, y, drop)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x, t, y, drop)
    mixed.float().square().sum().backward()
    low = copy.deepcopy(model).bfloat16()(x.bfloat16(), t, y, drop)
    assert mixed.dtype == low.dtype == torch.bfloat16
    for output in (mixed, low):
        assert (output.float() - full).norm() < 0.05 * full.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# The CPU's flash attention has no batching rule; functorch loops over the examples and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_functional_per_example_gradients_match_a_loop() -> None:
    model, batch = tiny().double(), make_batch(dtype=torch.float64)
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
        output: Tensor = functional_call(model, parameters, tuple(part.unsqueeze(0) for part in example))
        return output.square().sum()

    together = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(trainable, *batch)
    for i in range(3):
        alone = gradients(model, tuple(part[i : i + 1] for part in batch))  # type: ignore[arg-type]
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i], value, rtol=1e-12, atol=1e-12)


def test_opacus_accepts_every_layer() -> None:
    validators = pytest.importorskip("opacus.validators")
    assert validators.ModuleValidator.validate(tiny(), strict=False) == []


def test_from_name_takes_sizes_from_the_registry_and_overrides() -> None:
    model = DiT.from_name("DiT-S/4", input_size=8, depth=1, num_classes=10)
    assert (model.hidden_size, model.patch_size, len(model.blocks)) == (384, 4, 1)
    with pytest.raises(UsageError, match="DiT-XL/8"):
        DiT.from_name("DiT-M/2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"input_size": 9}, "input_size: got 9; accepted: a multiple of 2"),
        (
            {"hidden_size": 18, "num_heads": 4},
            "hidden_size: got 18; accepted: a multiple of 4; .*num_heads=4",
        ),
        ({"hidden_size": 18}, "hidden_size: got 18; accepted: a multiple of 4"),
        ({"depth": 0}, "depth: got 0"),
        ({"in_channels": -1}, "in_channels: got -1"),
        ({"patch_size": 0}, "patch_size: got 0"),
        ({"num_classes": 1.5}, "num_classes: got 1.5"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob: got 1.5"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: got 0.0"),
    ],
)
def test_bad_sizes_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        DiT(**{**TINY, **overrides})
    assert "\n" not in str(caught.value)


def test_bad_inputs_are_named() -> None:
    model, (x, t, y, drop) = tiny(), make_batch()
    with pytest.raises(UsageError, match=r"x: got \(3, 3, 8, 8\); accepted: shape \(N, 4, 8, 8\)"):
        model(x[:, :3], t, y)
    with pytest.raises(UsageError, match=r"t: got \(1,\)"):
        model(x, t[:1], y)
    with pytest.raises(UsageError, match=r"y: got \(3, 1\)"):
        model(x, t, y[:, None])
    for mask in (drop[:2], drop.long()):
        with pytest.raises(UsageError, match="drop_labels: got"):
            model(x, t, y, mask)
