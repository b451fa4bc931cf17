"""Predictions for cards: what is chosen, what is counted, what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.core.measure import Measured
from memory_test.core.units import GIB, MIB
from memory_test.predict.allocator import OutOfMemoryError
from memory_test.predict.cards import CARDS, Card, find_card
from memory_test.predict.predict import imagined_run, predict_memory

H100 = CARDS["H100-80GB"]
SMALL: dict[str, Any] = {"model": "DiT-S/2", "depth": 2, "hidden_size": 128, "num_heads": 4, "batch_size": 2}


def predicted(card: Card = H100, *, limited: bool = False, **changes: Any) -> Measured:
    """Predict a small model on a card."""
    config = ExperimentConfig(**{"experiment": "vanilla", **SMALL, **changes})
    run = imagined_run(config.resolve(device="cuda", num_threads=1), card)
    return predict_memory(run, card, limited=limited)


@pytest.mark.parametrize(
    ("dtype", "card", "kernel"),
    [
        ("float32", "H100-80GB", "efficient"),
        ("bf16", "H100-80GB", "cudnn"),
        ("bf16", "A100-80GB", "flash"),
        ("bf16", "T4-16GB", "efficient"),
    ],
)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_attention_is_the_cards_also_where_it_is_recomputed(
    dtype: str, card: str, kernel: str, activation_checkpointing: bool
) -> None:
    found = predicted(CARDS[card], dtype=dtype, activation_checkpointing=activation_checkpointing)
    assert found.choices["attention_kernels"] == [f"_scaled_dot_product_{kernel}_attention"]


def test_what_is_held_is_counted_as_the_allocator_counts_it() -> None:
    found = predicted()
    repeat, parameters = found.repeat, found.choices["num_parameters"]
    breakdown = repeat.breakdown_bytes
    assert 4 * parameters <= breakdown["parameters"] <= 4 * parameters + 512 * 100
    assert breakdown["optimizer_state"] >= 8 * found.choices["num_trainable_parameters"]
    assert sum(breakdown.values()) == repeat.peak_allocated_bytes
    assert repeat.peak_allocated_bytes is not None
    assert repeat.peak_reserved_bytes is not None
    assert repeat.peak_reserved_bytes >= repeat.peak_allocated_bytes
    assert repeat.peak_reserved_bytes % (2 * MIB) == 0
    assert repeat.device_used_bytes == repeat.peak_reserved_bytes + H100.context_bytes


def test_a_card_that_is_too_small_is_noticed() -> None:
    assert predicted(limited=True).repeat.peak_allocated_bytes
    with pytest.raises(OutOfMemoryError):
        predicted(replace(H100, memory_bytes=H100.context_bytes + 64 * MIB), limited=True)


def test_auto_plans_for_the_memory_of_the_card() -> None:
    roomy = predicted(experiment="auto", batch_size=32)
    small = replace(H100, memory_bytes=H100.context_bytes + 160 * MIB)
    tight = predicted(small, experiment="auto", batch_size=32)
    assert roomy.choices["physical_batch"] == 32
    assert tight.choices["physical_batch"] < 32


def test_cards_are_found_by_name_by_size_and_as_described() -> None:
    assert find_card("a100-80gb") is CARDS["A100-80GB"]
    assert find_card("24GiB").memory_bytes == 24 * GIB
    assert find_card("24GB") == replace(CARDS["A10G-24GB"], name="24GB (as A10G-24GB)")
    assert find_card("96GB").memory_bytes < 96e9, "drivers report less than labels say"
    card = find_card("custom:memory=10,sms=20,context=300")
    assert (card.memory_bytes, card.num_sms, card.context_bytes) == (10 * GIB, 20, 300 * MIB)


@pytest.mark.parametrize(
    "name",
    [
        "H1000",
        "GB",
        "-4GB",
        "custom:",
        "custom:sms=3",
        "custom:memory=x",
        "custom:ram=3",
        "nanGB",
        "infGB",
        "custom:memory=24,bandwidth=0",
        "custom:memory=1e308",
        "custom:memory=24,float32=0",
        "custom:memory=0.1",
        "0.5GB",
    ],
)
def test_other_cards_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"^gpu: got ") as raised:
        find_card(name)
    assert "\n" not in str(raised.value)
