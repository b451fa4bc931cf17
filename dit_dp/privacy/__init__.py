"""Privacy: who is in a step, what a run costs, and the ledger of what it released."""

from typing import TYPE_CHECKING

from dit_dp.lazy import lazily
from dit_dp.privacy.accounting import Mechanism, check_delta, epsilon, epsilon_of
from dit_dp.privacy.calibration import noise_multiplier, steps_within
from dit_dp.privacy.entries import Facts, Position
from dit_dp.privacy.ledger import Ledger
from dit_dp.privacy.statement import PrivacyStatement

if TYPE_CHECKING:
    from dit_dp.privacy.sampling import KEY_SIZE, PoissonSampler, ShuffledSampler

__all__ = [
    "KEY_SIZE",
    "Facts",
    "Ledger",
    "Mechanism",
    "PoissonSampler",
    "Position",
    "PrivacyStatement",
    "ShuffledSampler",
    "check_delta",
    "epsilon",
    "epsilon_of",
    "noise_multiplier",
    "steps_within",
]

_NEED_TORCH = ("KEY_SIZE", "PoissonSampler", "ShuffledSampler")


__getattr__ = lazily(__name__, dict.fromkeys(_NEED_TORCH, "dit_dp.privacy.sampling"))
