"""The two sides of a comparison, and results that are kept until what they come from changes."""

import dataclasses
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from memory_test.core.store import write_text
from memory_test.predict.allocator import OutOfMemoryError
from memory_test.predict.cards import CARDS, Card
from memory_test.predict.emulator.build import ROOT, SOURCE, Emulator
from memory_test.predict.emulator.cases import Case, allocator_options
from memory_test.predict.emulator.record import Result, numbers
from memory_test.predict.predict import imagined_run, predict_memory

CARD: Card = dataclasses.replace(CARDS["H100-80GB"], attention="flash", cudnn_convolution=False)
"""What is emulated: cuDNN is not, so half precision takes the flash kernel and convolution torch's own."""


def emulate(emulator: Emulator, case: Case, card: Card = CARD) -> Result:
    """Measure a configuration on the emulated runtime, in a process of its own.

    Raises:
        RuntimeError: The process failed, otherwise than for want of memory.
    """
    environment = emulator.environment(
        EMULATED_MEMORY=card.usable_bytes,
        EMULATED_SMS=card.num_sms,
        EMULATED_THREADS=card.threads_per_sm,
        EMULATED_CAPABILITY=10 * card.major + card.minor,
        PYTORCH_ALLOC_CONF=allocator_options(case.settings),
    )
    request = {"resolved": case.resolved(), "settings": dataclasses.asdict(case.settings)}
    command = [str(emulator.python), "-m", "memory_test.predict.emulator.guest"]
    done = subprocess.run(command, env=environment, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip()[-2000:]}")
    answer: Result = json.loads(done.stdout.splitlines()[-1])
    return answer


def predict(case: Case, card: Card = CARD) -> Result:
    """Predict a configuration in this process; what is emulated has no context, so its total is what is usable."""
    bare = dataclasses.replace(card, memory_bytes=card.usable_bytes, context_bytes=0)
    try:
        measured = predict_memory(imagined_run(case.resolved(), bare), bare, settings=case.settings, limited=True)
    except OutOfMemoryError as error:
        return {"status": "oom", "error": str(error)}
    return {"status": "ok", **numbers(measured)}


def digest(paths: Iterable[Path]) -> str:
    """Return a short digest of files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def sources(side: str) -> list[Path]:
    """Return the files that decide the result of a side, ``emulated`` or ``predicted``."""
    files = [*(ROOT / "dit_dp").rglob("*.py"), *(ROOT / "memory_test" / "core").glob("*.py")]
    here = SOURCE.parent
    if side == "predicted":
        return files + list(here.parent.glob("*.py"))
    return [*files, SOURCE, here / "guest.py", here / "events.py", here.parent / "allocator.py"]


class Kept:
    """Results on disk, one file each, until the sources behind them change.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._digests = {side: digest(sources(side)) for side in ("emulated", "predicted")}

    def get(self, side: str, name: str, run: Callable[[], Result]) -> Result:
        """Return a configuration's result on a side, of `run()` if there is none yet."""
        key = hashlib.sha256(f"{name}{self._digests[side]}".encode()).hexdigest()[:16]
        path = self._folder / f"{side}-{key}.json"
        if not path.exists():
            start = time.perf_counter()
            result = run()
            write_text(path, json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}))
        kept: Result = json.loads(path.read_text(encoding="utf-8"))
        return kept
