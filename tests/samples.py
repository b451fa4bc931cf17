"""A seeded sample of many combinations: these run in CI, the others under the marker `full`."""

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest

SEED = int(os.environ.get("SAMPLE_SEED", "0"))
"""What is drawn; printed at the end of a run, and another one is tried by the environment variable of this name."""


def sampled(cases: Sequence[tuple[str, ...]], number: int) -> list[Any]:
    """Return all cases as parameters of a test: a sample of them as they are, the others marked `full`."""
    drawn = set(random.Random(f"{SEED} {cases[0]}").sample(range(len(cases)), number))
    return [pytest.param(*case, marks=[] if n in drawn else pytest.mark.full) for n, case in enumerate(cases)]
