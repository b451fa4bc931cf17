"""The systems that are trained and measured: a registry, what a user chooses of one, and what is built from it.

Names are resolved on first use, so that reading the registry does not import torch.
"""

from typing import TYPE_CHECKING

from dit_dp.lazy import lazily
from dit_dp.workloads.config import WorkloadConfig, WorkloadSpec
from dit_dp.workloads.registry import WORKLOADS, Workload
from dit_dp.workloads.stored import stored_spec

if TYPE_CHECKING:
    from dit_dp.workloads.build import build_model, build_objective, input_shape

_BUILT = ("build_model", "build_objective", "input_shape")

__all__ = [
    "WORKLOADS",
    "Workload",
    "WorkloadConfig",
    "WorkloadSpec",
    "build_model",
    "build_objective",
    "input_shape",
    "stored_spec",
]


__getattr__ = lazily(__name__, dict.fromkeys(_BUILT, "dit_dp.workloads.build"))
