"""The parts of the campaign, in the order in which they are worth having. Plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_dp.errors import UsageError
from memory_test.predict.emulator.cases import CASES

Kind = Literal["sweep", "compare", "cases", "edges", "processes", "predictions", "report"]
Need = Literal["CUDA", "triton", "opacus", "compute-sanitizer"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of the campaign with a folder of its own; it consists of steps that are kept one by one.

    Attributes:
        name: Of the part and of its folder.
        what: One line for people.
        kind: Who runs it.
        steps: How many there are at most. A sweep that stops at the edge has fewer.
        step_seconds: Expected for each, start of a process included: guessed, until the first steps are through.
        needs: What it cannot do without.
        file: Of a sweep or comparison, a shipped one.
        where: Of a sweep: values that its cells have.
    """

    name: str
    what: str
    kind: Kind
    steps: int
    step_seconds: float
    needs: tuple[Need, ...] = ("CUDA",)
    file: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def minutes(self) -> float:
        """Expected wall time of all steps, an upper bound where a sweep stops at the edge."""
        return self.steps * self.step_seconds / 60

    @property
    def on_gpu(self) -> bool:
        """Whether it needs a GPU."""
        return "CUDA" in self.needs


_OURS_AND_PEERS: tuple[Need, ...] = ("CUDA", "triton", "opacus")

_SHAPES: dict[str, dict[str, Any]] = {
    "256": {"in_channels": 4, "image_size": 256},
    "512": {"in_channels": 4, "image_size": 512},
    "rgb": {"in_channels": 3, "image_size": 256},
}
_CELL_SECONDS = {"S": 12.0, "B": 15.0, "XL": 28.0}
_CELLS = {"S256": 250, "B256": 240, "XL256": 200, "S512": 210, "B512": 200, "XL512": 160, "Srgb": 110, "Brgb": 100}
"""Cells up to the edge, roughly; see the sweep."""


def _engine(size: str, shape: str, dtype: str) -> Part:
    pixels = "256 px RGB" if shape == "rgb" else f"{shape} px"
    return Part(
        name=f"engine-{size.lower()}-{shape}-{dtype}",
        what=f"DiT-{size}/2, {pixels}, {dtype}: every method, batch doubled to the edge",
        kind="sweep",
        steps=_CELLS.get(f"{size}{shape}", 60) // 2,
        step_seconds=_CELL_SECONDS[size],
        needs=_OURS_AND_PEERS,
        file="h100_engine",
        where={"model": f"DiT-{size}/2", "dtype": dtype, **_SHAPES[shape]},
    )


PARTS: tuple[Part, ...] = (
    Part(
        name="smoke",
        what="every method on a small model: does it run on this machine at all",
        kind="sweep",
        steps=14,
        step_seconds=10,
        needs=_OURS_AND_PEERS,
        file="h100_smoke",
    ),
    Part(
        name="ratios-edge",
        what="auto and ordinary training in turns at the largest batches of DiT-XL/2, bf16",
        kind="compare",
        steps=2,
        step_seconds=240,
        needs=("CUDA", "triton"),
        file="h100_edge",
    ),
    Part(
        name="largest",
        what="DiT-XL/2, bf16, at the largest batches: Opacus's ghost clipping beside ordinary training and auto",
        kind="sweep",
        steps=6,
        step_seconds=28,
        needs=_OURS_AND_PEERS,
        file="h100_largest",
    ),
    Part(
        name="prediction",
        what="the configurations of the emulator, measured",
        kind="cases",
        steps=len(CASES),
        step_seconds=14,
        needs=_OURS_AND_PEERS,
    ),
    Part(
        name="edges",
        what="largest batches: the predicted one, which must fit, and one more, which must not",
        kind="edges",
        steps=26,
        step_seconds=15,
        needs=_OURS_AND_PEERS,
    ),
    Part(
        name="workspaces",
        what="what attention and convolution of each library allocate inside",
        kind="processes",
        steps=1,
        step_seconds=120,
    ),
    Part(
        name="calibration",
        what="rates of this card, and step times of whole steps that took no part in them",
        kind="processes",
        steps=1,
        step_seconds=420,
        needs=("CUDA", "triton"),
    ),
    Part(
        name="kernels",
        what="Triton kernels by tile, warps, stages: time against copy and product, error against float64",
        kind="processes",
        steps=5,
        step_seconds=90,
        needs=("CUDA", "triton"),
    ),
    Part(
        name="sanitizer",
        what="the kernels on a small case under compute-sanitizer",
        kind="processes",
        steps=1,
        step_seconds=180,
        needs=("CUDA", "triton", "compute-sanitizer"),
    ),
    Part(
        name="ratios",
        what="contenders in turns, DiT-XL/2, bf16",
        kind="compare",
        steps=8,
        step_seconds=300,
        needs=_OURS_AND_PEERS,
        file="engine_h100",
    ),
    *(
        _engine(size, shape, dtype)
        for dtype in ("bf16", "float32")
        for shape in ("256", "512", "rgb")
        for size in ("XL", "B", "S")
    ),
    Part(
        name="predictions",
        what="predicts the batches that edges tries: best done before, it takes minutes of a processor",
        kind="predictions",
        steps=13,
        step_seconds=120,
        needs=(),
    ),
    Part(
        name="report",
        what="predicted against measured, edges, tables and figures from what is there",
        kind="report",
        steps=len(CASES),
        step_seconds=30,
        needs=(),
    ),
)


def chosen(names: Sequence[str]) -> list[Part]:
    """Return the parts that are meant, in order; without names all that need a GPU.

    Raises:
        UsageError: No part is called so, or begins so.
    """
    for name in names:
        if not any(part.name.startswith(name) for part in PARTS):
            raise UsageError.for_value("part", name, [part.name for part in PARTS])
    if not names:
        return [part for part in PARTS if part.on_gpu]
    exact = {part.name for part in PARTS} & set(names)
    beginnings = tuple(name for name in names if name not in exact)
    return [part for part in PARTS if part.name in exact or (beginnings and part.name.startswith(beginnings))]


def describe_parts() -> str:
    """Return the parts as a table."""
    width = max(len(part.name) for part in PARTS)
    head = f"{'part':<{width}}  minutes  needs"
    lines = [head, "-" * len(head)]
    for part in PARTS:
        lines.append(f"{part.name:<{width}}  {part.minutes:>7.0f}  {', '.join(part.needs) or 'no GPU'}: {part.what}")
    lines += ["", "Minutes are guesses from before the first run. Parts can be stopped and taken up again at any step."]
    return "\n".join(lines)
