"""The CUDA meters against the caching allocator's own figures. Needs a CUDA device."""

from typing import Any

import pytest
import torch

from dit_dp.clipping import METHODS
from memory_test.core import measure as measuring
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import BREAKDOWN
from memory_test.core.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLANT_BYTES = 10 * 2**20


def resolved(experiment: str, **changes: Any) -> dict[str, Any]:
    """Return a small configuration on CUDA."""
    sizes = {"model": "DiT-S/2", "depth": 2, "batch_size": 4, "num_iter": 2, "device": "cuda"}
    return ExperimentConfig(**{"experiment": experiment, **sizes, **changes}).resolve(device="cuda", num_threads=1)


def measured(config: dict[str, Any]) -> measuring.Measured:
    """Measure without progress."""
    return measuring.measure(config, lambda phase: None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    result = measured(resolved(method))
    repeat = result.repeat
    peak = repeat.peak_allocated_bytes
    assert peak is not None
    assert repeat.peak_reserved_bytes is not None
    assert repeat.peak_reserved_bytes >= peak
    assert sum(repeat.breakdown_bytes.values()) == peak
    # The allocator rounds up to 512 bytes and leaves up to 1 MiB unsplit at the end of a large block.
    assert 0 <= repeat.breakdown_bytes["unattributed"] < 0.05 * peak
    assert 0 <= repeat.breakdown_bytes["parameters"] - 4 * result.choices["num_parameters"] < 2**20
    assert result.choices["attention_kernels"]


@pytest.mark.parametrize("method", ["vanilla", "ghost"])
def test_the_timing_pass_leaves_nothing_behind(method: str) -> None:
    first = measured(resolved(method)).repeat.peak_allocated_bytes
    second = measured(resolved(method)).repeat.peak_allocated_bytes
    assert first == second


def test_a_planted_buffer_is_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    original = measuring.build

    def build(config: dict[str, Any]) -> Workload:
        workload = original(config)
        workload.model.register_buffer("planted", torch.ones(PLANT_BYTES // 4))
        return workload

    before = measured(resolved("ghost")).repeat.breakdown_bytes
    monkeypatch.setattr(measuring, "build", build)
    after = measured(resolved("ghost")).repeat.breakdown_bytes
    grown = {name: after[name] - before[name] for name in BREAKDOWN if after[name] - before[name] > PLANT_BYTES // 2}
    assert grown == {"parameters": PLANT_BYTES}
