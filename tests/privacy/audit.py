"""A lower bound on epsilon from one run (Steinke, Nasr and Jagielski, arXiv 2305.08846), and the run that it is from.

Each of m canaries is in the data or not, by a coin of its own. Whoever sees the released model guesses which are, as
often as they dare. Of a mechanism that is (epsilon, delta)-DP nobody guesses more of r right than a binomial variable
with success probability e^epsilon / (1 + e^epsilon) says, up to a term in delta (theorem 5.2): an epsilon at which the
guesses made are too good to be chance is refuted.
"""

from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.clipping.batch import Batch
from dit_dp.privacy import PoissonSampler
from dit_dp.training.step import train_step

CONFIDENCE = 0.999
"""With which a bound holds: a test that runs for years must not fail by chance."""


def p_value(epsilon: float, delta: float, *, num_canaries: int, guesses: int, right: int) -> float:
    """Return an upper bound on the probability of so many right guesses under (epsilon, delta)-DP."""
    chance = 1 / (1 + 2.718281828459045**-epsilon)
    tail = float(binom.sf(right - 1, guesses, chance))
    just_below = binom.pmf([right - i for i in range(1, right + 1)], guesses, chance).cumsum()
    worst = max((float(mass) / i for i, mass in enumerate(just_below, 1)), default=0.0)
    return min(1.0, tail + 2 * num_canaries * delta * worst)


def lower_bound(delta: float, *, num_canaries: int, guesses: int, right: int) -> float:
    """Return the largest epsilon that the guesses refute with `CONFIDENCE`; 0 if they refute none."""
    low, high = 0.0, 30.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        refuted = p_value(middle, delta, num_canaries=num_canaries, guesses=guesses, right=right) < 1 - CONFIDENCE
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is audited.

    Attributes:
        noise_multiplier: sigma that the engine is given.
        max_grad_norm: C that the engine is given.
        sample_rate: q.
        num_steps: T.
        num_canaries: m; each has a weight of its own.
        gradient_norm: Of every canary's gradient before clipping.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    num_steps: int
    num_canaries: int = 600
    gradient_norm: float = 500.0


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return losses whose gradients are minus the examples, as a wrong output's would be."""
    (x,) = batch  # type: ignore[misc]
    losses: Tensor = -model(x)[:, 0]
    return losses


def train(run: Run, seed: int) -> tuple[Tensor, Tensor]:
    """Train on the canaries that a coin chose; return (m,) who was in, and (m,) how far their weights moved."""
    generator = torch.Generator().manual_seed(seed)
    included = torch.rand(run.num_canaries, generator=generator) < 0.5
    members = included.nonzero()[:, 0]
    examples = run.gradient_norm * torch.eye(run.num_canaries)[members]
    model = nn.Linear(run.num_canaries, 1, bias=False)
    before = model.weight.detach().clone()
    engine = attach(model, "bookkeeping", max_grad_norm=run.max_grad_norm)
    optimizer = torch.optim.SGD(engine.parameters.values(), lr=1.0)
    sampler = PoissonSampler(len(members), run.sample_rate, entropy=seed.to_bytes(32, "little"))
    for _ in range(run.num_steps):
        train_step(
            engine,
            optimizer,
            _loss,
            [(examples[sampler.draw()],)],
            noise_multiplier=run.noise_multiplier,
            expected_batch_size=1.0,
            generator=generator,
        )
    return included, (model.weight.detach() - before)[0]


def audit(run: Run, delta: float, seed: int = 0) -> float:
    """Return the lower bound: the third of the canaries that moved most are guessed in, the least third out."""
    included, moved = train(run, seed)
    order, third = moved.argsort(), run.num_canaries // 3
    right = int(included[order[-third:]].sum() + (~included[order[:third]]).sum())
    return lower_bound(delta, num_canaries=run.num_canaries, guesses=2 * third, right=right)
