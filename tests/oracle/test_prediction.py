"""A predicted peak against the allocator's true one, on the CPU, where every method can be measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_dp.clipping import METHODS
from memory_test.core.config import ExperimentConfig
from memory_test.core.measure import measure_memory
from memory_test.predict.predict import imagined_run, predict_memory
from tests.models import DIFFUSERS
from tests.samples import sampled
from tests.workload_models import REFUSED

pytestmark = pytest.mark.counted

Note = Callable[[str, float], None]

MOST = {"peak_allocated_bytes": 0.005, "first_step_peak_allocated_bytes": 0.01}
"""Largest relative errors: what operations allocate inside is not seen; in a first step's trials it shows most."""

SMALL: dict[str, Any] = {"model": "DiT-S/2", "depth": 2, "hidden_size": 128, "num_heads": 4}


def silent(phase: str) -> None:
    """Say nothing of progress."""


def check(note: Note, *, phases: bool = True, **changes: Any) -> None:
    """Predict and measure one configuration; the peak, what was chosen, and every phase's peak unless told not to."""
    config = ExperimentConfig(**changes, device="cpu")
    resolved = config.resolve(device="cpu", num_threads=1)
    predicted = predict_memory(imagined_run(resolved, None), None)
    measured = measure_memory(resolved, silent)
    for name, most in MOST.items():
        got, wanted = getattr(predicted.repeat, name), getattr(measured.repeat, name)
        note(f"predicted {name}, one process on the CPU", abs(got - wanted) / wanted)
        assert abs(got - wanted) <= most * wanted, f"{name}: predicted {got}, measured {wanted}"
    found = measured.choices
    free = {"memory_budget_bytes": found["memory_budget_bytes"]} if "memory_budget_bytes" in found else {}
    assert {**predicted.choices, **free} == found
    for phase, record in measured.repeat.phases.items() if phases else ():
        got, wanted = predicted.repeat.phases[phase].peak_allocated_bytes, record.peak_allocated_bytes
        assert got is not None
        assert wanted is not None
        assert abs(got - wanted) <= MOST["peak_allocated_bytes"] * wanted, (
            f"{phase}: predicted {got}, measured {wanted}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_every_method(found_off: Note, method: str) -> None:
    check(found_off, **SMALL, experiment=method, batch_size=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"activation_checkpointing": True},
        {"optimizer": "sgd"},
        {"optimizer": "adam", "optimizer_impl": "foreach"},
        {"optimizer_impl": "fused"},
        {"in_channels": 3, "image_size": 32, "data": "digits"},
        {"learn_sigma": False},
        {"accumulation": 2, "ema": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["vanilla", "bookkeeping", "lean"])
def test_every_option(found_off: Note, method: str, changes: dict[str, Any]) -> None:
    check(found_off, **{**SMALL, **changes}, experiment=method, batch_size=3)


WORKLOADS: dict[str, dict[str, Any]] = {
    "x2": {**SMALL, "image_size": 128, "model_options": ("x2_width=96",)},
    "set": {"depth": 2, "hidden_size": 72, "num_heads": 3, "image_size": 16, "model_options": ("sample_size=3",)},
    "ddt": {
        "model": "DDT-S",
        "in_channels": 48,
        "image_size": 8,
        "model_options": ("hidden_size=[96,144]", "depth=[2,1]"),
    },
    "panda": {"depth": 2, "image_size": 32, "hidden_size": 32, "num_heads": 2},
    "diffusers": {},
}
CELLS = {name: [(method, name) for method in METHODS if method not in REFUSED[name]] for name in WORKLOADS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small random model of diffusers: 2 blocks, width 128, 256 tokens."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dit")
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "sample_size": 32, "num_embeds_ada_norm": 1000}
    DiTTransformer2DModel(**{**DIFFUSERS, **sizes}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("method", "name"), [cell for cells in CELLS.values() for cell in sampled(cells, 2)])
def test_every_workload(found_off: Note, method: str, name: str, saved: Path) -> None:
    model = {"model": str(saved)} if name == "diffusers" else {}
    check(found_off, workload=name, **WORKLOADS[name], **model, experiment=method, batch_size=4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x2", {"train": "full"}),
        ("x2", {"model_options": ("x2_fuse_every=1", "x2_width=96")}),
        ("set", {"train": "encoder_then_full(7)", "objective": ("multiplicity=2",)}),
        ("set", {"model_options": ("sample_size=3", "variational=true", "conditioning=lag")}),
        ("dit", {**SMALL, "objective": ("multiplicity=2",)}),
    ],
    ids=str,
)
def test_what_trains_and_what_a_unit_is(found_off: Note, name: str, changes: dict[str, Any]) -> None:
    check(found_off, workload=name, **{**WORKLOADS.get(name, {}), **changes}, experiment="bookkeeping", batch_size=4)


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "batch_size": 3}, {"dtype": "bf16"}], ids=str)
@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in ("vanilla", "bookkeeping", "ghost", "auto") for name in ("fixed", "Made")]
    + [("opacus", "fixed")],
)
def test_a_users_model(found_off: Note, method: str, name: str, changes: dict[str, Any]) -> None:
    model: dict[str, Any] = {"model": f"tests.own_models:{name}", "batch_size": 16, **changes}
    # In bf16 the CPU's products copy an operand inside, 4 % of what so small a model holds in its forward.
    check(found_off, experiment=method, phases=changes.get("dtype") != "bf16", **model)
