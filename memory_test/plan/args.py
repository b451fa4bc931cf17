"""What `memory-test plan` takes. No torch, so that ``--help`` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig, experiment_of
from memory_test.core.model_args import ModelArgs
from memory_test.core.store import check_writable
from memory_test.predict.cards import Card, find_card

DEFAULT_METHODS = (
    "vanilla",
    "auto",
    "bookkeeping",
    "flash_clip_bk",
    "ghost",
    "lean",
    "microbatch",
    "opacus-ghost",
)
"""What is planned unless methods are named: the baseline, ours that differ in cost, and the leanest peer."""


@dataclass(frozen=True, kw_only=True)
class PlanArgs(ModelArgs):
    """Say per method how large a physical batch fits a card, how many make the logical one, and which to take.

    --recipe NAME|FILE takes model, batch, optimizer and budget from a recipe of dit-dp train; options after it win.

    Exit code 0: there is a recommendation; 1: no private method fits; 2: a mistake in the call.
    """

    gpu: str = "H100-80GB"
    """A card by name (memory-test cards lists them), a size such as 24GB, or custom:memory=24,sms=128,..."""
    batch_size: int = 256
    """Logical batch: (expected) examples (images, or sets) a step, whatever fits the card at once."""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16: autocast, parameters stay float32."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer."""
    optimizer_impl: Literal["auto", "foreach", "fused", "for-loop"] = "auto"
    """auto: torch's own default, foreach on CUDA."""
    ema: bool = False
    """Keep a float32 moving average of what trains."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[METHOD ...]")] = DEFAULT_METHODS
    """Methods to plan."""
    calibration: Path | None = None
    """File of `memory-test calibrate` to count time with; default: the one shipped for the card, if any."""
    margin: float = 0.02
    """Share of the card's memory to leave free: predictions have errors, and so have neighbours."""
    epsilon: float | None = None
    """Privacy budget; with --delta, --dataset-size and --steps the noise multiplier is computed."""
    delta: float | None = None
    """Privacy budget."""
    dataset_size: int | None = None
    """Number of examples (privacy units) that are trained on."""
    steps: int | None = None
    """Steps of the whole training."""
    json: Path | None = None
    """Write the plan to this file too."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        validate.integer("batch_size", self.batch_size)
        for name in self.methods:
            validate.one_of("methods", name, METHODS)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UsageError.for_value("methods", " ".join(self.methods), "each method once, at least one")
        if not 0 <= self.margin < 1:
            raise UsageError.for_value("margin", self.margin, "a number >= 0 and < 1")
        if self.json is not None:
            check_writable(self.json, "json")
        find_card(self.gpu)
        self._check_privacy()
        self.cell("vanilla", 1, 1)

    def _check_privacy(self) -> None:
        given = {name: getattr(self, name) for name in ("epsilon", "delta", "dataset_size", "steps")}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if missing:
            fix = "the noise multiplier follows from all four of epsilon, delta, dataset_size, steps"
            raise UsageError.for_value(missing[0], None, "a value", fix)
        validate.real("epsilon", self.epsilon, positive=True)
        validate.real("delta", self.delta, positive=True)
        if self.delta is not None and self.delta >= 1:
            raise UsageError.for_value("delta", self.delta, "a number > 0 and < 1")
        validate.integer("dataset_size", self.dataset_size)
        validate.integer("steps", self.steps)
        if self.dataset_size is not None and self.batch_size > self.dataset_size:
            raise UsageError.for_value("batch_size", self.batch_size, f"<= {self.dataset_size}, the dataset_size")

    @property
    def card(self) -> Card:
        """The card meant."""
        return find_card(self.gpu)

    def cell(self, method: str, batch_size: int, accumulation: int) -> ExperimentConfig:
        """Return one method's cell.

        Raises:
            UsageError: The method cannot run so, and why.
        """
        return experiment_of(self, method, batch_size=batch_size, accumulation=accumulation)
