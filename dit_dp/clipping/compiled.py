"""What engines need of `torch.compile`: layers that stay out of its graphs, trials without it, graphs walked twice.

A watched layer's call runs Python in its backward, which a compiled graph cannot hold. So the call breaks the graph:
what lies between layers (norms, modulation, activations, attention, the loss) is compiled, the layers' own products
are not, and what an engine keeps is an ordinary tensor, never a buffer that a compiled graph would reuse.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch import config

from dit_dp.clipping.graph import nodes_of
from dit_dp.errors import EngineStateError, UnsupportedModelError

P = ParamSpec("P")
R = TypeVar("R")

REASON = "a clipping engine watches this layer's calls; compile without fullgraph=True, or use method='microbatch'"
"""What torch says, and we after it, where a watched model shall be compiled as one graph."""


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that compiled code calls and does not look into."""
    kept_out: Callable[P, R] = torch.compiler.disable(function, reason=REASON)  # type: ignore[no-untyped-call]
    return kept_out


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules as they were written: a trial of one unit or two is not what they are compiled for."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def compiling(*, walked_twice: bool) -> Iterator[None]:
    """Surround a forward that may compile what it runs.

    Args:
        walked_twice: Whether the backward will be walked twice. By default compiled code writes over saved activations
            that nobody else holds ("donated buffers"); it is told not to.

    Raises:
        UnsupportedModelError: A watched layer shall be part of one whole graph.
    """
    try:
        with config.patch(donated_buffer=False) if walked_twice else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if REASON not in str(error):
            raise
        raise UnsupportedModelError(f"model: it cannot be compiled as one graph: {REASON}") from error


@contextlib.contextmanager
def walking_twice(losses: Tensor, method: str) -> Iterator[None]:
    """Surround the first of two backward passes over the graph of some losses.

    torch's own check is switched off inside: it takes code that was compiled for two walks and for changing shapes, and
    thus has no list of donated buffers, for code that has one.

    Raises:
        EngineStateError: A part of the graph was compiled to be walked once; nothing was written over yet.
    """
    if donates(losses):
        raise EngineStateError(
            f"backward: {method} walks the graph twice, and a part of it was compiled to be walked once; call "
            f"accumulate after torch.compiler.reset(), which compiles it for two walks, or use method='bookkeeping'"
        )
    with config.patch(donated_buffer=False):
        yield


def donates(losses: Tensor) -> bool:
    """Return whether a part of a graph was compiled to write over what it saved."""
    compiled = (getattr(node, "_forward_cls", None) for node in nodes_of(losses))
    return any(getattr(getattr(each, "metadata", None), "bw_donated_idxs", None) for each in compiled)
