"""Parts that are programs of their own: each step writes one JSON that names its environment, or fails and says why."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dit_dp.errors import UsageError
from memory_test.campaign.budget import Pace
from memory_test.campaign.campaign import Outcome, Site
from memory_test.campaign.parts import Part
from memory_test.core.schema import Environment
from memory_test.core.store import write_text
from memory_test.sweep.sweep import same_environment

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (("gram", "bf16"), ("direct", "bf16"), ("sum", "bf16"), ("gram", "float32"), ("direct", "float32"))
"""Kernel and dtype; the sum of float32 operands is a library's."""


@dataclass(frozen=True)
class Step:
    """A program: the arguments of the interpreter, and the file that it writes, which is its last argument."""

    path: Path
    arguments: Sequence[str]

    @property
    def command(self) -> list[str]:
        """What is run."""
        return [sys.executable, "-P", *self.arguments, str(self.path)]


def steps_of(part: str, folder: Path, card: str) -> list[Step]:
    """Return the programs of a part."""
    if part == "calibration":
        options = ["--device", "cuda", "--card", card, "--output"]
        return [Step(folder / f"{card}.json", ["-m", "memory_test.cli", "calibrate", *options])]
    if part == "workspaces":
        return [Step(folder / "workspaces.json", ["-m", "memory_test.campaign.workspaces"])]
    if part == "sanitizer":
        return [Step(folder / "sanitizer.json", ["-m", "memory_test.campaign.sanitize"])]
    assert part == "kernels", part
    return [
        Step(folder / f"{kernel}-{dtype}.json", ["-m", "memory_test.campaign.tune", kernel, dtype])
        for kernel, dtype in KERNELS
    ]


def run_processes(part: Part, site: Site, pace: Pace) -> Outcome:
    """Run the programs of a part."""
    return run_steps(steps_of(part.name, site.folder(part.name), site.card), part, site, pace)


def run_steps(steps: Sequence[Step], part: Part, site: Site, pace: Pace) -> Outcome:
    """Run the programs whose file is not there, as far as there is time."""
    assert site.environment is not None
    done = failed = left = 0
    for step in steps:
        if _is_there(step.path, site):
            done += 1
            continue
        seconds = pace.begin()
        if seconds is None:
            left += 1
            continue
        why = _run(step, seconds)
        done, failed, left = done + (not why), failed + bool(why), left + bool(why)
        site.say(f"{part.name}: {step.path.name}: {why or 'written'}")
    return Outcome(done=done, left=left, failed=failed)


def _is_there(path: Path, site: Site) -> bool:
    """Return whether a file was written in this environment."""
    if not path.exists():
        return False
    assert site.environment is not None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        measured_in = TypeAdapter(Environment).validate_json(json.dumps(found["environment"]))
    except (ValueError, KeyError) as error:
        fix = "move it away; that step is then run again"
        raise UsageError.for_value("output_dir", str(path), "a file of this campaign", fix) from error
    return same_environment(measured_in, site.environment, path, site.on_mismatch)


def _run(step: Step, seconds: float) -> str:
    """Run a program; return why it failed, and keep what it said in a file beside its own."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = step.path.with_suffix(".log")
    try:
        done = subprocess.run(
            step.command,
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s, when time was up"
    if done.returncode == 0 and step.path.exists():
        log.unlink(missing_ok=True)
        return ""
    said = f"{done.stdout}\n{done.stderr}".replace(f"{ROOT}{os.sep}", "").replace(f"{sys.prefix}{os.sep}", "")
    write_text(log, said[-20_000:])
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return f"exit code {done.returncode}: {last[0][:200]}; see {log.name}"


def record_of(environment: Environment, **content: Any) -> str:
    """Return a step's result as JSON text."""
    data = {"schema_version": 1, "environment": dataclasses.asdict(environment), **content}
    return json.dumps(data, indent=1) + "\n"
