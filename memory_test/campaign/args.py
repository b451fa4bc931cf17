"""Options of the campaign; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dit_dp import validate
from memory_test.predict.cards import CARDS


@dataclass(frozen=True, kw_only=True)
class CampaignArgs:
    """Measure on this machine's GPU everything that the repository claims about CUDA, part by part.

    The same command again goes on where it stopped. Exit code 0: it ended as planned, all done or out of time; 1:
    something failed; 2: a mistake in the call, or no CUDA device.
    """

    part: tuple[str, ...] = ()
    """Parts by name, or by how names begin, such as engine-xl; default: all that need a GPU, in the order of --list."""
    minutes: float = 8.0
    """Wall time for all of it: nothing is begun that would not fit."""
    output_dir: Path = Path("results") / "h100"
    """Folder of the results, a folder in it for each part."""
    card: str = "H100-80GB"
    """What this GPU is in the catalogue (memory-test cards)."""
    on_mismatch: Annotated[str, tyro.conf.arg(metavar="{refuse,rerun}")] = "refuse"
    """What to do with results of another environment, such as another commit."""
    retry_failed: bool = False
    """Measure again what ended in error, timeout or crash."""
    lanes: int = 1
    """How many small memory passes of prediction and edges may share the card: their peaks are the processes' own."""
    list_parts: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the parts, their expected minutes and what they need; measure nothing."""

    def __post_init__(self) -> None:
        validate.real("minutes", self.minutes, positive=True)
        validate.integer("lanes", self.lanes, minimum=1)
        validate.one_of("card", self.card, CARDS)
        validate.one_of("on_mismatch", self.on_mismatch, ("refuse", "rerun"))
