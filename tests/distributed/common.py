"""What tests of replicas and of shards share; everything here runs on a rank."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dit_dp.clipping import METHODS, attach
from dit_dp.clipping.batch import Batch, map_tensors
from dit_dp.clipping.engine import Engine
from dit_dp.clipping.reference import clipped_sum
from dit_dp.errors import UsageError
from tests.distributed.pool import alone
from tests.models import Case, make_case

OURS = [name for name, facts in METHODS.items() if facts.private and not facts.peer]
SHARDED = [name for name in OURS if METHODS[name].sharded]


def mine(batch: Batch, first: int = 3) -> Batch:
    """Return this rank's rows: rank 0 has the first few, rank 1 the rest."""
    rows = slice(0, first) if dist.get_rank() == 0 else slice(first, None)
    return map_tensors(lambda t: t[rows], batch)


def groups_of(model: nn.Module, method: str) -> list[list[str]] | None:
    """Return the groups by which a method clips, for the oracle."""
    if METHODS[method].flat:
        return None
    engine = attach(copy.deepcopy(model), method, process_group=alone())
    return engine.groups


def oracle(case: Case, method: str, row_to_unit: Tensor | None = None) -> tuple[dict[str, Tensor], float]:
    """Return the clipped sum over both ranks' units, and the threshold, at which about half are clipped."""
    _, norms = clipped_sum(case.model, case.loss_fn, case.batch, 1.0, row_to_unit)
    threshold = float(norms.median())
    groups = groups_of(case.model, method)
    return clipped_sum(case.model, case.loss_fn, case.batch, threshold, row_to_unit, groups)[0], threshold


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Return the gradients at full shape; every rank must ask."""
    assert all(p.grad is not None for p in engine.parameters.values())
    return {name: whole(p.grad) for name, p in engine.parameters.items() if p.grad is not None}


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return |got - wanted| / |wanted| over all parameters together."""
    off = sum(float((got[name].double() - value).square().sum()) for name, value in wanted.items())
    return (off / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def error_after_step(
    engine: Engine, case: Case, wanted: dict[str, Tensor], parts: Iterable[Any], **options: Any
) -> float:
    """Accumulate a rank's parts, sum; return the relative error."""
    for part in parts:
        engine.accumulate(case.loss_fn, part, **options)
    engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
    return relative_error(gradients(engine), wanted)


def message_of(function: Callable[[], object]) -> str:
    """Return what a call's `UsageError` says."""
    try:
        function()
    except UsageError as error:
        return str(error)
    return "no error"


def one_ranks_noise(kind: str) -> dict[str, Tensor]:
    """Return what one rank with no units releases, from a generator seeded with 5."""
    case = make_case(kind, num_examples=0)
    engine = attach(case.model, "ghost", process_group=alone())
    return noise_of(engine, case, torch.Generator().manual_seed(5))


def noise_of(engine: Engine, case: Case, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Release an empty batch and clear it."""
    engine.accumulate(case.loss_fn, map_tensors(lambda t: t[:0], case.batch))
    engine.privatize(noise_multiplier=2.0, expected_batch_size=3, generator=generator)
    found = {name: value.clone() for name, value in gradients(engine).items()}
    engine.zero_grad()
    return found
