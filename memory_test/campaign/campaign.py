"""Runs parts one after the other: skips what is there, stops before what would not fit. No torch in this process.

This process never touches the GPU: whatever it held there would be missing in the measurements of its workers.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dit_dp.console import note, say
from dit_dp.errors import UsageError
from memory_test.campaign.args import CampaignArgs
from memory_test.campaign.budget import Budget, Pace
from memory_test.campaign.parts import Kind, Part, chosen, describe_parts
from memory_test.core.config import ExperimentConfig
from memory_test.core.schema import Environment
from memory_test.sweep.runner import probe
from memory_test.sweep.sweep import OnMismatch, check_folder, make_folder


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a part works.

    Attributes:
        root: Folder of the whole campaign.
        card: Name in the catalogue.
        environment: Of the GPU; `None` where there is none.
        on_mismatch: What to do with results of another environment.
        retry_failed: Whether what ended otherwise than ok or out of memory is measured again.
        lanes: How many small memory passes may share the card.
        say: Told what goes on.
    """

    root: Path
    card: str
    environment: Environment | None
    on_mismatch: OnMismatch = "refuse"
    retry_failed: bool = False
    lanes: int = 1
    say: Callable[[str], None] = note

    def folder(self, part: str) -> Path:
        """Return a part's folder, which is there from then on."""
        made = self.root / part
        make_folder(made)
        return made


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is there of a part now.

    Attributes:
        done: Steps with a result, earlier ones included.
        left: Steps without.
        failed: Steps that ended otherwise than they may: out of memory is a result.
    """

    done: int
    left: int
    failed: int = 0

    @property
    def words(self) -> str:
        """The outcome in words."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} done{failed}, " + (f"{self.left} left" if self.left else "complete")


Runner = Callable[[Part, Site, Pace], Outcome]

RUNNERS: dict[Kind, str] = {
    "sweep": "memory_test.campaign.grids:run_sweep",
    "compare": "memory_test.campaign.grids:run_compare_part",
    "cases": "memory_test.campaign.cases:run_cases",
    "edges": "memory_test.campaign.edges:run_edges",
    "processes": "memory_test.campaign.processes:run_processes",
    "predictions": "memory_test.campaign.edges:run_predictions",
    "report": "memory_test.campaign.summary:run_report",
}
"""``module:function`` by kind of part; loaded when it is needed."""


def run_campaign(args: CampaignArgs) -> int:
    """Run what is chosen within the time; return the exit code.

    Raises:
        UsageError: A part that there is not, a folder that cannot be written to, results of another environment, or
            parts that need a GPU where there is none.
    """
    parts = chosen(args.part)
    if args.list_parts:
        say(describe_parts())
        return 0
    check_folder(args.output_dir)
    budget = Budget(60 * args.minutes)
    environment = gpu() if any(part.on_gpu for part in parts) else None
    make_folder(args.output_dir)
    site = Site(
        root=args.output_dir,
        card=args.card,
        environment=environment,
        on_mismatch=cast(OnMismatch, args.on_mismatch),
        retry_failed=args.retry_failed,
        lanes=args.lanes,
    )
    return run_parts(parts, site, budget)


def run_parts(parts: Sequence[Part], site: Site, budget: Budget) -> int:
    """Run parts in order, each as far as there is time, and say what became of each; return the exit code."""
    failed = 0
    for part in parts:
        missing = [need for need in part.needs if not available(need)]
        if missing:
            say(f"{part.name}: skipped, there is no {', '.join(missing)} here")
            continue
        outcome = runner(part.kind)(part, site, Pace(budget, part.step_seconds))
        failed += outcome.failed
        say(f"{part.name}: {outcome.words}")
    return 1 if failed else 0


def runner(kind: Kind) -> Runner:
    """Import and return who runs a kind of part."""
    module, _, name = RUNNERS[kind].partition(":")
    return cast(Runner, getattr(importlib.import_module(module), name))


def available(need: str) -> bool:
    """Return whether something that a part needs is here; the GPU is asked for once, by `gpu`."""
    if need == "CUDA":
        return True
    if need == "compute-sanitizer":
        return shutil.which(need) is not None
    return importlib.util.find_spec(need) is not None


def gpu() -> Environment:
    """Return the environment of this machine's GPU.

    Raises:
        UsageError: There is none.
    """
    try:
        return probe(ExperimentConfig(experiment="vanilla", device="cuda"))[0]
    except UsageError as error:
        if not str(error).startswith("device: "):
            raise
        raise UsageError.for_value(
            "device", "no CUDA device", "one that torch can use", "--part predictions report need none"
        ) from None
