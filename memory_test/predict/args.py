"""What `memory-test predict` and `calibrate` take. No torch, so that ``--help`` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.core.store import check_writable
from memory_test.core.units import MIB
from memory_test.predict.cards import CARDS, Card, find_card
from memory_test.predict.rates import calibration_of
from memory_test.predict.settings import AllocatorSettings

CPU_NAME = "cpu"
"""What stands for this machine's CPU in place of a card."""

Sharding = Literal["none", "ddp", "fsdp2"]

MOST_RANKS = 1024
"""FSDP2 and `DTensor` cut every tensor into as many pieces one by one, also in a prediction."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs:
    """Predict what a cell takes on a card, without a GPU.

    Exit code 0: it fits; 1: it does not; 2: a mistake in the call.
    """

    config: ExperimentConfig
    gpu: str = "H100-80GB"
    """A card by name (memory-test cards lists them), a label such as 24GB (the smallest of that label),
    custom:memory=24,sms=128,attention=math,..., or cpu: this machine's."""
    expandable_segments: bool = False
    """As in PYTORCH_ALLOC_CONF."""
    world_size: int = 1
    """Ranks that train together, each with BATCH_SIZE examples of its own; rank 0 is predicted."""
    sharding: Sharding = "none"
    """Over several ranks: ddp: each has the whole model; fsdp2: each has its part, gathered by transformer block."""
    max_split_size_mb: int | None = None
    """As in PYTORCH_ALLOC_CONF."""
    garbage_collection_threshold: float = 0.0
    """As in PYTORCH_ALLOC_CONF; acts only together with --memory-fraction."""
    memory_fraction: float | None = None
    """Share of the card that may be reserved, as torch.cuda.set_per_process_memory_fraction."""
    calibration: Path | None = None
    """File of `memory-test calibrate` to count time with; default: the one shipped for the card, if any."""
    output: Path | None = None
    """File of the record (source: predicted); default: none."""
    timeline: Path | None = None
    """HTML file of the memory through a step."""
    snapshot: Path | None = None
    """File in the format of torch's memory snapshots, for https://pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        for name in ("output", "timeline", "snapshot"):
            if getattr(self, name) is not None:
                check_writable(getattr(self, name), name)
        if self.max_split_size_mb is not None:
            validate.integer("max_split_size_mb", self.max_split_size_mb, minimum=21, fix="torch wants more than 20")
        threshold = self.garbage_collection_threshold
        if threshold != 0 and not 0 < threshold < 1:
            raise UsageError.for_value("garbage_collection_threshold", threshold, "a number > 0 and < 1; 0: off")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise UsageError.for_value("memory_fraction", self.memory_fraction, "a number > 0 and <= 1")
        if self.config.compile:
            raise UsageError.for_value("compile", True, "False", "what a compiler allocates is not modelled")
        if self.config.device == "cpu" and self.card is not None:
            raise UsageError.for_value("device", "cpu", "auto", "--gpu says where; this machine's CPU is --gpu cpu")
        if self.config.device == "cuda" and self.card is None:
            raise UsageError.for_value("device", "cuda", "auto", "--gpu cpu is this machine's CPU; name a card")
        if self.card is None and self.snapshot is not None:
            raise UsageError.for_value("snapshot", str(self.snapshot), "a card", "only CUDA has such snapshots")
        if self.calibration is not None:
            calibration_of(self.card, self.calibration)  # a wrong file is said at once
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Refuse ranks that cannot train together, or not by this method."""
        if isinstance(self.world_size, bool) or not 1 <= self.world_size <= MOST_RANKS:
            raise UsageError.for_value("world_size", self.world_size, f"an integer from 1 to {MOST_RANKS}")
        shardings = get_args(Sharding)
        validate.one_of("sharding", self.sharding, shardings)
        if self.sharding == "none" and self.world_size > 1:
            raise UsageError.for_value("sharding", "none", shardings[1:], f"{self.world_size} ranks share one model")
        if self.sharding != "none" and self.world_size == 1:
            raise UsageError.for_value(
                "world_size", 1, "an integer >= 2", f"--sharding {self.sharding} is about several ranks"
            )
        method = self.config.experiment
        if self.sharding != "none" and METHODS[method].peer:
            ours = [name for name, facts in METHODS.items() if not facts.peer]
            raise UsageError.for_value("experiment", method, ours, "peers run on one rank")
        if self.sharding == "fsdp2" and not METHODS[method].sharded:
            able = [name for name, facts in METHODS.items() if facts.sharded]
            raise UsageError.for_value("experiment", method, able, "it cannot run on FSDP2's shards")

    @property
    def ranks(self) -> dict[str, Any]:
        """What a resolved configuration says of several ranks; nothing of one."""
        return {"world_size": self.world_size, "sharding": self.sharding} if self.world_size > 1 else {}

    @property
    def card(self) -> Card | None:
        """The card meant; `None`: this machine's CPU."""
        return None if self.gpu == CPU_NAME else find_card(self.gpu)

    @property
    def settings(self) -> AllocatorSettings:
        """The caching allocator's options."""
        split = None if self.max_split_size_mb is None else self.max_split_size_mb * MIB
        return AllocatorSettings(
            expandable_segments=self.expandable_segments,
            max_split_bytes=split,
            garbage_collection_threshold=self.garbage_collection_threshold,
            memory_fraction=self.memory_fraction,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrateArgs:
    """Measure the rates of this machine's device, so that predictions of step time are times."""

    output: Path
    """File to write; a card's belongs to memory_test/predict/calibration/CARD.json."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA if there is one."""
    card: str | None = None
    """Name in the catalogue (memory-test cards); default: the card whose memory and SMs this device has."""
    seconds: float = 0.5
    """Shortest time each kernel is run for."""
    quick: bool = False
    """Small models and batches for the whole steps: for trying it out."""

    def __post_init__(self) -> None:
        check_writable(self.output)
        if not self.seconds > 0:
            raise UsageError.for_value("seconds", self.seconds, "a number > 0")
        if self.card is not None and self.card not in CARDS:
            raise UsageError.for_value("card", self.card, CARDS)
