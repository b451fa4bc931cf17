"""Privacy accounting: what a run costs, and the noise that a budget asks for."""

from dit_dp.privacy.accounting import Mechanism, epsilon, noise_multiplier

__all__ = ["Mechanism", "epsilon", "noise_multiplier"]
