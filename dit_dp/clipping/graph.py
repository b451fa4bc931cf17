"""What an autograd graph is made of, and how often it uses a parameter."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def nodes_of(outputs: Tensor) -> Iterator[Any]:
    """Yield each node of a graph once."""
    seen, stack = set(), [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [child for child, _ in node.next_functions]


def parameter_uses(outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Count how many operations of a graph read each parameter.

    Args:
        outputs: The result whose graph is walked.
        parameters: By name.

    Returns:
        For every name the number of operations that read it; a cast of it that several share (autocast's cache)
        counts as many times as it is read.
    """
    readers: dict[Any, list[Any]] = {}
    edges: Counter[Any] = Counter()
    leaves = {}
    for node in nodes_of(outputs):
        for child, _ in node.next_functions:
            if child is not None:
                edges[child] += 1
                readers.setdefault(child, []).append(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node
    uses = {}
    for name, parameter in parameters.items():
        node = leaves.get(id(parameter))
        while node is not None and len(readers[node]) == 1 and "ToCopy" in type(readers[node][0]).__name__:
            node = readers[node][0]
        uses[name] = 0 if node is None else edges[node]
    return uses
