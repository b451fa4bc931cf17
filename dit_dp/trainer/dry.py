"""A run that is only looked at: what its model would be refused for is refused, and nothing is written."""

from functools import partial

import torch

from dit_dp.clipping import attach
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.saving import named_run, starting_model
from dit_dp.trainer.tracker import check_tracker
from dit_dp.training import PhaseRunner
from dit_dp.training.groups import add_lora, members
from dit_dp.workloads import WorkloadSpec


def check_run(config: TrainConfig, spec: WorkloadSpec, *, alone: bool) -> None:
    """Refuse what the run would refuse of its tracker, folder and model, before its first step.

    Tensors have no data, unless weights are to be loaded, which are then looked at as the run would.

    Args:
        config: What was asked for.
        spec: Of the workload.
        alone: Whether this is the only process. Of several, groups are looked at, not what the method makes of them.

    Raises:
        UsageError: The model cannot be made, has no such group, or cannot be trained by the method.
    """
    check_tracker(config.tracker)
    if config.resume not in (None, "auto"):
        named_run(config.resume or "")
    loads = config.weights is not None or spec.arguments.get("pretrained", False)
    with torch.device("cpu" if loads else "meta"):
        model = starting_model(config, spec)
    if alone:
        engine = partial(attach, method=config.method, max_grad_norm=config.max_grad_norm)
        runner = PhaseRunner(model, spec.schedule, attach=engine, make_optimizer=partial(torch.optim.SGD, lr=1.0))
        runner.engine.detach()
        return
    if spec.schedule.lora_rank is not None:
        add_lora(model, spec.schedule.lora_rank)
    for phase in spec.schedule.phases:
        members(model, phase.groups)
