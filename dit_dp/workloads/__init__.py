"""The systems that are trained and measured: a registry, what a user chooses of one, and what is built from it.

Names are resolved on first use, so that reading the registry does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name in _BUILT:
        return getattr(importlib.import_module("dit_dp.workloads.build"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
