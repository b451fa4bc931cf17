"""Every method on the DiT under its full loss, and on diffusers' model, against the float64 loop."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import UnsupportedModelError
from dit_dp.models import DiT, DiTHuggingFaceWrapper
from dit_dp.models.dit import randomize_zero_init_
from dit_dp.objectives import DDPMObjective
from tests.models import DIFFUSERS, groups_of
from tests.workload_models import REFUSED

PRIVATE = [name for name, method in METHODS.items() if method.private]
OBJECTIVE = DDPMObjective(learn_sigma=True, class_dropout_prob=0.5)


def tiny_dit(**changes: object) -> DiT:
    """Return a DiT of two blocks whose zero-initialised parameters were made random."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 2}
    model = DiT(**{**sizes, "num_classes": 5, **changes}).train()  # type: ignore[arg-type]
    randomize_zero_init_(model, torch.Generator().manual_seed(1))
    return model


def draw(num_examples: int = 4, channels: int = 4, size: int = 8) -> dict[str, Tensor]:
    """Return a batch whose steps include t = 0, the likelihood term."""
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(num_examples, channels, size, size, generator=generator).clamp(-1, 1)
    batch = OBJECTIVE.draw(x0, torch.randint(0, 5, (num_examples,), generator=generator), generator)
    batch["t"] = torch.tensor([0, 1, 500, 999])[:num_examples]
    batch["x_t"] = OBJECTIVE.diffuse(batch["x0"], batch["noise"], batch["t"])
    batch["drop_labels"] = torch.tensor([True, False, False, True])[:num_examples]
    return batch


def error_of(method: str, model: nn.Module, batch: Batch, **options: object) -> float:
    """Return the relative error of a method's clipped sum, at a threshold that clips about half."""
    _, norms = clipped_sum(model, OBJECTIVE, batch, 1.0)
    threshold = float(norms.median())
    wanted, _ = clipped_sum(model, OBJECTIVE, batch, threshold, groups=groups_of(model, method))
    engine = attach(model, method, max_grad_norm=threshold, **options)
    engine.accumulate(OBJECTIVE, batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    object.__setattr__(model, "_last_engine", engine)
    off = sum(float((p.grad.double() - wanted[n]).square().sum()) for n, p in engine.parameters.items())  # type: ignore[union-attr]
    return (off / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


@pytest.mark.parametrize("method", PRIVATE)
def test_dit_in_float32(method: str) -> None:
    assert error_of(method, tiny_dit(), draw()) < 1e-5


@pytest.mark.parametrize("method", PRIVATE)
def test_dit_in_float64(method: str) -> None:
    batch = {name: t.double() if t.is_floating_point() else t for name, t in draw().items()}
    assert error_of(method, tiny_dit().double(), batch) < 1e-12


@pytest.mark.parametrize("method", PRIVATE)
@pytest.mark.parametrize("patch_size", [4, 8])
def test_dit_of_few_tokens(method: str, patch_size: int) -> None:
    """T = 4, and T = 1, where every layer takes the outer-product rule."""
    assert error_of(method, tiny_dit(patch_size=patch_size, in_channels=3), draw(channels=3)) < 1e-5


@pytest.mark.parametrize(
    ("method", "options", "rules"),
    [
        ("ghost", {}, {"ghost", "direct", "outer product"}),
        ("flash_clip", {}, {"ghost", "outer product"}),
        ("flash_clip_bk", {}, {"ghost", "outer product"}),
        ("bookkeeping", {}, {"ghost", "keep", "outer product"}),
        ("bookkeeping", {"keep_up_to": 0.0}, {"ghost", "outer product"}),
        ("bookkeeping", {"keep_up_to": float("inf")}, {"keep", "outer product"}),
    ],
)
def test_every_norm_rule_is_exercised_and_none_changes_the_gradient(
    method: str, options: dict[str, float], rules: set[str]
) -> None:
    model = tiny_dit(hidden_size=96, patch_size=1 if method == "ghost" else 2)
    assert error_of(method, model, draw(), **options) < 1e-5
    engine = model._last_engine  # type: ignore[union-attr]
    assert set(engine.choices()["norm_rules"]) == rules


@pytest.mark.parametrize("method", [m for m in PRIVATE if METHODS[m].supports_checkpointing])
def test_dit_with_activation_checkpointing(method: str) -> None:
    assert error_of(method, tiny_dit(activation_checkpointing=True), draw()) < 1e-5


@pytest.mark.parametrize("method", [m for m in PRIVATE if METHODS[m].supports_autocast])
def test_dit_under_bf16_autocast(method: str) -> None:
    check_bf16(method, tiny_dit())


def check_bf16(method: str, model: nn.Module) -> None:
    """Operands rounded to bf16 (relative 2^-9 each) leave the sum within a few per cent."""
    batch = draw()
    wanted, norms = clipped_sum(model, OBJECTIVE, batch, 1e9)
    engine = attach(model, method, max_grad_norm=1e9)

    def lowered(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return OBJECTIVE(model, batch)

    got_norms = engine.accumulate(lowered, batch)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    off = sum(float((p.grad.double() - wanted[n]).square().sum()) for n, p in engine.parameters.items())  # type: ignore[union-attr]
    assert (off / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5 < 0.05
    if got_norms is not None:
        torch.testing.assert_close(got_norms.double(), norms, rtol=0.05, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in engine.parameters.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random model that diffusers itself saved."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dit")
    model = DiTTransformer2DModel(**{**DIFFUSERS, "attention_head_dim": 12, "num_embeds_ada_norm": 5})
    randomize_zero_init_(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return folder


def wrapped(folder: Path) -> DiTHuggingFaceWrapper:
    """Return diffusers' model from its folder."""
    return DiTHuggingFaceWrapper(
        model_name=str(folder), img_size=64, patch_size=2, in_channels=4, num_classes=5, pretrained=True
    ).train()


@pytest.mark.parametrize("method", PRIVATE)
def test_diffusers_model(method: str, saved: Path) -> None:
    """Block 0's embedder runs twice in a forward: cross terms count."""
    wrapper = wrapped(saved)
    if method in REFUSED["diffusers"]:
        before = [p.detach().clone() for p in wrapper.parameters()]
        with pytest.raises(UnsupportedModelError, match=REFUSED["diffusers"][method]):
            attach(wrapper, method).accumulate(OBJECTIVE, draw())
        assert all(torch.equal(p, q) for p, q in zip(wrapper.parameters(), before, strict=True))
        return
    assert error_of(method, wrapper, draw()) < 1e-5


@pytest.mark.parametrize("method", [m for m in PRIVATE if m not in REFUSED["diffusers"]])
def test_diffusers_model_under_bf16_autocast(method: str, saved: Path) -> None:
    check_bf16(method, wrapped(saved))
