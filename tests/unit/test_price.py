"""What a log says was spent is never less than that, and costs little to know."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dit_dp.errors import UsageError
from dit_dp.privacy import Mechanism, epsilon
from dit_dp.privacy.statement import rounded_up
from dit_dp.trainer.folder import RunLog
from dit_dp.trainer.price import SHARE, Price
from dit_dp.trainer.progress import describe

STEP = Mechanism(noise_multiplier=1.0, sample_rate=0.01, num_steps=1)
DELTA = 1e-5


class Machine:
    """A clock, and an accountant that takes its time; epsilon is the number of steps."""

    def __init__(self, cost_s: float) -> None:
        self.now, self.cost_s, self.num_asked = 0.0, cost_s, 0

    def clock(self) -> float:
        return self.now

    def account(self, mechanisms: Sequence[Mechanism], delta: float) -> float:
        self.now, self.num_asked = self.now + self.cost_s, self.num_asked + 1
        return float(sum(mechanism.num_steps for mechanism in mechanisms))


def charged(count: int) -> list[Mechanism]:
    return [replace(STEP, num_steps=count)]


@pytest.mark.parametrize("lost", [0, 7])
@pytest.mark.parametrize(("step_time_s", "every", "steps"), [(0.05, 100, 20_000), (0.001, 1, 3000), (0.02, 7, 100)])
def test_the_log_says_no_less_than_was_spent_in_a_share_of_the_time(
    step_time_s: float, every: int, steps: int, lost: int
) -> None:
    machine = Machine(cost_s=0.5)
    price = Price(DELTA, machine.account, machine.clock)
    for step in range(1, steps + 1):
        machine.now += step_time_s
        if step % every == 0 or step in (1, steps):
            spent = price.at_most(charged(lost + step), STEP, steps - step)
            assert spent.epsilon == spent.num_charges
            assert lost + step <= spent.num_charges <= lost + steps
    assert (spent.epsilon, price.exactly(charged(lost + steps))) == (lost + steps, spent)
    assert 0.5 * machine.num_asked <= SHARE * machine.now + 2 * 0.5 + 0.5


def test_slow_steps_have_their_own_epsilon() -> None:
    machine = Machine(cost_s=0.5)
    price = Price(DELTA, machine.account, machine.clock)
    for step in range(10, 100, 10):
        machine.now += 10 * 5.1
        spent = price.at_most(charged(step), STEP, 1000)
        assert step <= spent.num_charges <= step + 9


def test_what_is_said_is_the_accountants() -> None:
    machine = Machine(cost_s=0.0)
    price = Price(DELTA, clock=machine.clock)
    price._cost_s, price._known = 10.0, None  # so dear that it is asked ahead
    machine.now = 1.0
    said = [price.at_most(charged(count), STEP, 60 - count).epsilon for count in (1, 20, 60)]
    assert said == [epsilon(replace(STEP, num_steps=60), DELTA)] * 3
    assert said[0] > epsilon(replace(STEP, num_steps=20), DELTA)


def test_an_accountant_that_takes_too_long_is_not_asked_for_every_line(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(cost_s=60.0)

    def account(mechanisms: Sequence[Mechanism], delta: float) -> float:
        machine.account(mechanisms, delta)
        raise UsageError("accountant: no answer after 60 s")

    price = Price(DELTA, account, machine.clock)
    for step in range(1, 100):
        machine.now += 0.1
        assert price.at_most(charged(step), STEP, 10_000).epsilon is None
    assert machine.num_asked == 2
    assert "no answer" in caplog.text


def test_epsilon_is_beside_its_delta_and_a_bound_says_so(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"loss": 0.5, "epsilon": 0.17321, "delta": 1e-5, "epsilon_charges": 3, "num_charges": 3}
    bound = {**values, "epsilon_charges": 5}
    log = RunLog(tmp_path)
    log.line(3, values)
    log.line(3, bound)
    log.close()
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("(step=0000003) Train Loss: 0.5, Epsilon: 0.1733 (delta 1e-05)")
    assert second.endswith("(step=0000003) Train Loss: 0.5, Epsilon: at most 0.1733 (delta 1e-05)")
    assert describe(values) == "ε 0.1733 (δ 1e-05)  loss 0.5"
    assert describe(bound) == "ε ≤ 0.1733 (δ 1e-05)  loss 0.5"
    assert describe({"loss": 0.5}) == "loss 0.5"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.17321, "0.1733"), (0.1732, "0.1732"), (7.9911, "7.992"), (9.99951, "10"), (0.0, "0"), (math.inf, "inf")],
)
def test_an_epsilon_is_rounded_up(value: float, text: str) -> None:
    assert rounded_up(value) == text
