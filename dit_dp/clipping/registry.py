"""Every clipping method by name. No torch: engines are imported when one is attached."""

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_dp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.distributed import ProcessGroup

    from dit_dp.clipping.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to obtain the sum of clipped per-example gradients.

    Attributes:
        engine: ``module:class`` of the engine.
        summary: One line for people.
        private: Whether it clips and takes noise; `vanilla` does not.
        peer: Whether it is somebody else's implementation, measured for comparison.
        supports_checkpointing: Whether activation checkpointing leaves its gradients correct.
        supports_autocast: Whether it runs under bf16 autocast.
        supports_compile: Whether `torch.compile` leaves its gradients correct.
        flat: Whether the norm that is clipped is that of the whole gradient; if not, results of two methods differ.
        owns_forward: Whether it must run the forward itself, so that `Engine.backward` is refused.
        takes_memory_budget: Whether `attach` accepts ``memory_budget``, the peak (bytes) that it plans for.
        sharded: Whether it runs on parameters that FSDP2 has sharded.
    """

    engine: str
    summary: str
    private: bool = True
    peer: bool = False
    supports_checkpointing: bool = True
    supports_autocast: bool = True
    supports_compile: bool = True
    flat: bool = True
    owns_forward: bool = False
    takes_memory_budget: bool = False
    sharded: bool = False


METHODS: dict[str, Method] = {
    "vanilla": Method(
        engine="dit_dp.clipping.vanilla:VanillaEngine",
        summary="ordinary training, no clipping, no noise: the baseline of every ratio",
        private=False,
    ),
    "auto": Method(
        engine="dit_dp.clipping.auto:AutoEngine",
        summary="ours: exact, the fastest plan within a memory budget: rules, physical batch, recomputed blocks",
        takes_memory_budget=True,
    ),
    "bookkeeping": Method(
        engine="dit_dp.clipping.bookkeeping:BookkeepingEngine",
        summary="ours: exact, one backward pass that books what the clipped sum needs",
    ),
    "ghost": Method(
        engine="dit_dp.clipping.ghost:GhostEngine",
        summary="ours: exact two-pass ghost clipping, per-example gradients never stored",
        sharded=True,
    ),
    "lean": Method(
        engine="dit_dp.clipping.lean:LeanEngine",
        summary="ours: exact, blocks recomputed for the norms and again for the sum; least memory of a whole batch",
    ),
    "per_layer": Method(
        engine="dit_dp.clipping.per_layer:PerLayerEngine",
        summary="ours: each layer clipped to C / sqrt(layers); another mechanism than flat clipping",
        flat=False,
        sharded=True,
    ),
    "flash_clip": Method(
        engine="dit_dp.clipping.flash:FlashClipEngine",
        summary="ours: exact two-pass ghost clipping, norms tile by tile in fast memory (Triton on CUDA)",
        sharded=True,
    ),
    "flash_clip_bk": Method(
        engine="dit_dp.clipping.flash:FlashClipBookkeepingEngine",
        summary="ours: exact, one backward pass that books operands, norms tile by tile as in flash_clip",
    ),
    "ghost_fsdp_bk": Method(
        engine="dit_dp.clipping.sharded:ShardedBookkeepingEngine",
        summary="ours: bookkeeping under FSDP2, one clipped sum at full shape at a time",
        sharded=True,
    ),
    "microbatch": Method(
        engine="dit_dp.clipping.microbatch:MicrobatchEngine",
        summary="the plain loop: one example at a time, whatever the layers",
        owns_forward=True,
    ),
    "opacus": Method(
        engine="dit_dp.clipping.opacus:OpacusEngine",
        summary="Opacus GradSampleModule (hooks): per-example gradients of every layer stored",
        peer=True,
        supports_checkpointing=False,
    ),
    "opacus-functorch": Method(
        engine="dit_dp.clipping.opacus:OpacusFunctorchEngine",
        summary="Opacus GradSampleModule with force_functorch: the same by vmap",
        peer=True,
        supports_checkpointing=False,
    ),
    "opacus-ew": Method(
        engine="dit_dp.clipping.opacus:OpacusExpandedWeightsEngine",
        summary="Opacus with PyTorch's ExpandedWeights",
        peer=True,
        supports_checkpointing=False,
        supports_autocast=False,
        supports_compile=False,
    ),
    "opacus-ghost": Method(
        engine="dit_dp.clipping.opacus:OpacusGhostEngine",
        summary="Opacus ghost clipping: norms by hooks, second backward for the clipped sum",
        peer=True,
        supports_checkpointing=False,
    ),
}


def attach(
    model: "nn.Module",
    method: str = "auto",
    max_grad_norm: float = 1.0,
    on_phase: "Callable[[str], None] | None" = None,
    process_group: "ProcessGroup | None" = None,
    **performance: Any,
) -> "Engine":
    """Attach a clipping engine to a model.

    Args:
        model: The model to train; put back as it was by `Engine.detach`. Of `DistributedDataParallel` the module
            inside is attached; parameters that `fully_shard` has sharded stay so.
        method: A key of `METHODS`.
        max_grad_norm: C, the bound on the norm of each example's contribution; > 0.
        on_phase: Called with ``forward``, ``backward``, ``clip`` or ``noise`` when that phase begins.
        process_group: The ranks that train a plain model together, each with units of its own; they start from the
            first rank's parameters. DDP and `fully_shard` know their ranks. No unit may be on two ranks in one step
            (`DistributedSampler` without `drop_last` repeats some), or its contribution is counted twice.
        **performance: Settings of the engine that change cost, never the private gradient.

    Returns:
        The engine: `accumulate` or `backward`, then `privatize`, then the optimizer's step.

    Raises:
        UsageError: Unknown method or setting, a model that is no module, C that is not a finite positive number, or
            ranks that are not said or not possible with this method.
        UnsupportedModelError: The method cannot run on this model; names the layer.
    """
    if method not in METHODS:
        raise UsageError.for_value("method", method, METHODS)
    from torch import nn

    from dit_dp.clipping.join import join

    if not isinstance(model, nn.Module):
        raise UsageError.for_value("model", type(model).__name__, "a torch.nn.Module")
    accepted = settings_of(method)
    for setting in performance:
        if setting not in accepted:
            takers = [repr(name) for name in METHODS if setting in settings_of(name)]
            raise UsageError(
                f"{setting}: method {method!r} does not take it; accepted: {', '.join(accepted) or 'no setting'}; "
                f"{'use method=' + ' or '.join(takers) if takers else 'leave it out'}"
            )
    module, ranks = join(model, method, process_group)
    engine: Engine = engine_class(method)(module, max_grad_norm=max_grad_norm, on_phase=on_phase, **performance)
    engine.join(ranks)
    return engine


def settings_of(method: str) -> list[str]:
    """Return the names of what `attach` accepts for a method beside its own arguments."""
    shared = ("self", "model", "max_grad_norm", "on_phase")
    return [name for name in inspect.signature(engine_class(method).__init__).parameters if name not in shared]


def engine_class(method: str) -> "type[Engine]":
    """Import and return the engine of a method, a key of `METHODS`."""
    module, _, name = METHODS[method].engine.partition(":")
    loaded: type[Engine] = getattr(importlib.import_module(module), name)
    return loaded
