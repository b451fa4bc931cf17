"""Count what per-example norms cost by either rule in every system at its authors' size, and time two telling layers.

Of a linear layer with T positions, d inputs and p outputs, ghost norms take 0.56 T^2 (d + p) multiply-adds an example
and direct ones T d p; at T = 1 either is d + p. Ordinary training takes 3 T d p. The layers that are timed are
attention's input projection of panda at 4096 tokens, and the modulation that DDT's head computes for every token. One
thread, one example, in turns; under a minute. Writes the record to the path given.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dit_dp.clipping.contributions import GHOST_SHARE, Outer, OuterRule
from memory_test.compare.ratios import paired
from memory_test.core.environment import capture
from memory_test.core.store import check_writable, write_text
from memory_test.inspection.args import InspectArgs
from memory_test.inspection.facts import Inspection, ModuleFacts
from memory_test.inspection.inspection import inspect_model
from memory_test.inspection.subject import build_subject

SYSTEMS = ("dit", "x2", "set", "ddt", "panda")
TIMED = {"panda": "blocks.0.attn.qkv", "ddt": "blocks.29.adaLN_modulation.1"}
RULES: tuple[OuterRule, ...] = ("ghost", "direct")
ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer as it is called: T positions, d inputs, p outputs."""

    name: str
    positions: int
    width: int
    out_width: int

    @property
    def multiply_adds(self) -> dict[str, float]:
        """Of one example: of ordinary training, of norms by either rule, and by whichever takes fewer."""
        t, d, p = self.positions, self.width, self.out_width
        costs = {"training": 3.0 * t * d * p}
        if t == 1:
            return {**costs, "ghost": d + p, "direct": d + p, "cheaper": d + p}
        ghost, direct = GHOST_SHARE * t * t * (d + p), float(t * d * p)
        return {**costs, "ghost": ghost, "direct": direct, "cheaper": min(ghost, direct)}


def layers_of(inspection: Inspection) -> Iterator[Layer]:
    """Yield every linear layer and patch embedding that trains."""
    for module in inspection.modules:
        found = _layer(module)
        if found is not None:
            yield found


def _layer(module: ModuleFacts) -> Layer | None:
    weights = [p.shape for p in module.parameters if p.name == "weight" and p.trainable]
    if module.type not in ("Linear", "Conv2d") or not weights or not module.calls:
        return None
    out, d = module.calls[0].outputs[0], torch.Size(weights[0][1:]).numel()
    positions = torch.Size(out[1:-1] if module.type == "Linear" else out[2:]).numel()
    return Layer(module.name, positions, d, weights[0][0])


def modulation_of(layers: Iterable[Layer]) -> dict[str, float]:
    """Return what modulation for every token, not for every example, takes: multiply-adds and float32 outputs."""
    found = [layer for layer in layers if "adaLN_modulation" in layer.name and layer.positions > 1]
    return {
        "layers": len(found),
        "training": sum(layer.multiply_adds["training"] for layer in found),
        "output_bytes": sum(4.0 * layer.positions * layer.out_width for layer in found),
    }


def timed(layer: Layer) -> dict[str, Any]:
    """Return seconds of both rules on random operands of one example, in turns, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(1, layer.positions, n, generator=generator) for n in (layer.width, layer.out_width))
    outer, times = Outer(a, g), {rule: [0.0] * ROUNDS for rule in RULES}
    for number in range(-2, ROUNDS):
        for rule in RULES if number % 2 else RULES[::-1]:
            start = time.perf_counter()
            outer.squared_norms(rule)
            times[rule][number] = time.perf_counter() - start
    ratio = dataclasses.asdict(paired(times["ghost"], times["direct"]))
    return {**dataclasses.asdict(layer), "seconds": times, "ghost_over_direct": ratio}


def main(path: Path) -> None:
    """Count, measure and write."""
    check_writable(path)
    torch.set_num_threads(1)
    counted, measured = {}, {}
    for system in SYSTEMS:
        found = {layer.name: layer for layer in layers_of(inspect_model(build_subject(InspectArgs(workload=system))))}
        costs = [layer.multiply_adds for layer in found.values()]
        counted[system] = {
            "layers": len(found),
            **{name: sum(cost[name] for cost in costs) for name in costs[0]},
            "modulation_by_token": modulation_of(found.values()),
        }
        if system in TIMED:
            measured[system] = timed(found[TIMED[system]])
    record = {
        "schema_version": 1,
        "environment": dataclasses.asdict(capture("cpu")),
        "multiply_adds": counted,
        "timed": measured,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
