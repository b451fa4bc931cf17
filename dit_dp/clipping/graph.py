"""What an autograd graph says about how often a parameter is used."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


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
    seen, stack = set(), [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            if child is not None:
                edges[child] += 1
                readers.setdefault(child, []).append(node)
                stack.append(child)
    leaves = {id(node.variable): node for node in seen if hasattr(node, "variable")}
    uses = {}
    for name, parameter in parameters.items():
        node = leaves.get(id(parameter))
        while node is not None and len(readers[node]) == 1 and "ToCopy" in type(readers[node][0]).__name__:
            node = readers[node][0]
        uses[name] = 0 if node is None else edges[node]
    return uses
