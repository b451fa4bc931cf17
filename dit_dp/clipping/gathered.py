"""FSDP2's full parameters, in and out of the place of the shards they are gathered from; nothing for other models.

FSDP2 is never imported here: who has sharded a model has, and imported only after a process group was made,
`torch.distributed.nn` would hold that group by default arguments beyond `destroy_process_group`, and gloo's threads may
then abort the process.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def reshard(model: nn.Module) -> None:
    """Put the shards in their place: after a forward without gradients, some groups' full parameters stay there.

    So they do after a forward that raised; torch 2.13 and later can be told that it is over.
    """
    for group in sharded_modules(model):
        try:
            group.reset_iter_state()
        except (AttributeError, RuntimeError):  # an older torch; not the root, or nothing has run yet
            group.reshard()


@contextlib.contextmanager
def root_gathered(model: nn.Module) -> Iterator[None]:
    """Have the root's parameters gathered while some of the model is run past its forward; then reshard all.

    Every rank has to come here, after a first forward of the whole: whatever runs first is the root to FSDP2.
    """
    for group in sharded_modules(model)[:1]:
        group.unshard()
    try:
        yield
    finally:
        reshard(model)


def fsdp_is_loaded() -> bool:
    """Return whether anybody can have sharded a model."""
    return "torch.distributed.fsdp" in sys.modules


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that were given to `fully_shard`, the root first."""
    if not fsdp_is_loaded():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
