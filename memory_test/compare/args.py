"""Options of ``memory-test compare``; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """Time contenders against a baseline in turns, one step at a time, with peak memory and gradient error beside."""

    file: tyro.conf.Positional[Path]
    """YAML file with configurations and contenders, or the name of a shipped one: engine_cpu, engine_h100,
    h100_edge."""
    output_dir: Path
    """Folder of the results, one file a configuration, with a table and figures."""
    configuration: str | None = None
    """Only this configuration of the file."""
    on_mismatch: Annotated[str, tyro.conf.arg(metavar="{refuse,rerun}")] = "refuse"
    """What to do with results of another environment or of another version of the file."""
