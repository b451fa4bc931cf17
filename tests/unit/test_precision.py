"""Norms and sums are taken in full float32 where a program lets its own products be rounded."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.precision import full_float32
from tests.models import make_case

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")


def allowed() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def by_older_name() -> None:
    torch.set_float32_matmul_precision("high")


def for_cuda_by_older_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def by_newer_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def for_everything() -> None:
    torch.backends.fp32_precision = "tf32"


WAYS = (by_older_name, for_cuda_by_older_name, by_newer_name, for_everything)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Put back what was allowed."""
    backends: Any = torch.backends
    places = (backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    yield
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def rounded(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Allow TF32 in one of the ways that torch has."""
    allow: Callable[[], None] = request.param
    allow()
    yield allowed()
    if allow in (by_older_name, for_cuda_by_older_name):
        torch.set_float32_matmul_precision("highest")


def test_what_was_allowed_for_everything_can_be_taken_back_for_everything() -> None:
    for_everything()
    with full_float32():
        assert "tf32" not in allowed()
    torch.backends.fp32_precision = "ieee"
    assert "tf32" not in allowed()


def test_a_choice_of_its_own_stays() -> None:
    """CUDA's products follow what is said of cuDNN unless something is said of them."""
    torch.backends.cudnn.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = "ieee", "bf16"
    with full_float32():
        pass
    assert allowed() == ("ieee", "bf16")


def test_it_is_full_meanwhile_and_as_before_after(rounded: tuple[str, str]) -> None:
    assert "tf32" in rounded
    found = []

    def fail() -> None:
        with full_float32():
            found.append(allowed())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(*found) <= {"ieee", "none"}
    assert allowed() == rounded


class Products(TorchDispatchMode):  # type: ignore[misc]
    """Notes what is allowed at every product while an engine takes norms or sums."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.found.setdefault(self.phase, set()).add("tf32" in allowed())
        return func(*args, **(kwargs or {}))

    phase = ""


ONE_WALK = [n for n, facts in METHODS.items() if facts.private and not facts.peer and n not in ("microbatch", "lean")]


@pytest.mark.parametrize("method", ONE_WALK)
def test_engines_norms_and_sums_are_full_and_the_models_products_are_not(method: str, rounded: tuple[str, str]) -> None:
    case, products = make_case("tokens"), Products()

    def note(phase: str) -> None:
        products.phase = phase

    engine = attach(case.model, method, 0.1, on_phase=note)
    engine.accumulate(case.loss_fn, case.batch)
    engine.zero_grad()
    with products:
        engine.accumulate(case.loss_fn, case.batch)
    assert products.found["forward"] == {True}
    assert any(False in products.found.get(phase, ()) for phase in ("backward", "clip"))
    if method not in ("ghost", "flash_clip", "per_layer"):  # these walk the model's backward again for the sum
        assert products.found["clip"] == {False}
    assert allowed() == rounded
