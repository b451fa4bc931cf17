import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dit_dp.errors import UsageError
from dit_dp.objectives import METRICS, PATHS, TARGETS, Objective, ObjectiveConfig, shift_for
from dit_dp.objectives.paths import Diffusion, make_path
from dit_dp.objectives.times import draw_times, shifted
from dit_dp.objectives.variational import variational_bound


class Fixed(nn.Module):
    """Returns what it was made with, one row each, and remembers what it was given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: Any, **more: Any) -> Any:
        self.inputs, self.more = inputs, more
        return self.output


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 4, 4, generator=generator(), dtype=torch.float64)


def labels(count: int = 6) -> Tensor:
    return torch.arange(count) % 5


def column(t: Tensor) -> Tensor:
    return t.double().view(-1, 1, 1, 1)


def coefficients(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma by their definition, (N, 1, 1, 1)."""
    if path == "flow":
        return 1 - column(t), column(t)
    if path == "additive":
        return torch.ones_like(column(t)), column(t)
    signal, kept = [], 1.0
    for step in range(1000):
        if path == "ddpm-linear":
            kept *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        else:
            level = [math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (step, step + 1)]
            kept *= max(level[1] / level[0], 0.001)
        signal.append(kept)
    alpha_bar = column(torch.tensor(signal, dtype=torch.float64)[t])
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("path", PATHS)
def test_what_is_drawn_lies_on_the_path(path: str) -> None:
    objective = Objective(ObjectiveConfig(path=path))  # type: ignore[arg-type]
    batch = objective.draw(images(), labels(), generator(1))
    alpha, sigma = coefficients(path, batch["t"])
    torch.testing.assert_close(batch["x_t"], alpha * batch["x0"] + sigma * batch["noise"], rtol=1e-10, atol=1e-12)
    assert torch.equal(batch["x0"], images())
    assert torch.equal(batch["y"], labels())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", PATHS)
def test_losses_are_the_mean_error_of_the_target(path: str, target: str, metric: str) -> None:
    objective = Objective(ObjectiveConfig(path=path, target=target, metric=metric))  # type: ignore[arg-type]
    batch = objective.draw(images(), labels(), generator(1))
    x0, eps = batch["x0"], batch["noise"]
    alpha, sigma = coefficients(path, batch["t"])
    velocity = {"flow": eps - x0, "additive": eps}.get(path, alpha * eps - sigma * x0)
    wanted = {"eps": eps, "x0": x0, "v": velocity}[target]
    output = images() + 1
    error = (output - wanted).square() if metric == "l2" else (output - wanted).abs()
    losses = objective(Fixed(output), batch)
    torch.testing.assert_close(losses, error.mean((1, 2, 3)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", PATHS)
def test_every_target_says_what_data_and_noise_are(path: str, target: Any) -> None:
    made = make_path(ObjectiveConfig(path=path))  # type: ignore[arg-type]
    x0, eps = images(), images().flip(0)
    t = torch.tensor([1, 2, 300, 700, 900, 990]) if "ddpm" in path else torch.linspace(0.05, 0.95, 6).double()
    x_t, aim = made.diffuse(x0, eps, t), made.target(target, x0, eps, t)
    # Dividing by alpha >= 0.0015 (cosine, step 990) or sigma >= 0.01 loses three digits of float64.
    torch.testing.assert_close(made.to_x0(target, aim, x_t, t), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made.to_eps(target, aim, x_t, t), eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_is_the_paths_derivative(path: str) -> None:
    """By t; on DDPM, by the angle whose cosine is alpha and whose sine is sigma."""
    made = make_path(ObjectiveConfig(path=path))  # type: ignore[arg-type]
    x0, eps = images(), images().flip(0)
    t = torch.arange(100, 700, 100) if "ddpm" in path else torch.linspace(0.1, 0.9, 6).double()
    if isinstance(made, Diffusion):
        angle, step = torch.atan2(made.noise(t, x0), made.signal(t, x0)), 1e-6
        after, before = ((angle + d).cos() * x0 + (angle + d).sin() * eps for d in (step, -step))
    else:
        step = 1e-6
        after, before = made.diffuse(x0, eps, t + step), made.diffuse(x0, eps, t - step)
    torch.testing.assert_close(made.velocity(x0, eps, t), (after - before) / (2 * step), rtol=0, atol=1e-8)


def test_targets_differ_by_the_signal_to_noise_ratio() -> None:
    """For one guess at x0, the squared error of eps is SNR times, that of v (SNR + 1) times that of x0."""
    x0_hat, losses = images() + 0.3, {}
    for target in TARGETS:
        objective = Objective(ObjectiveConfig(target=target))
        batch = objective.draw(images(), labels(), generator(1))
        alpha, sigma = coefficients("ddpm-linear", batch["t"])
        eps_hat = (batch["x_t"] - alpha * x0_hat) / sigma
        guess = {"x0": x0_hat, "eps": eps_hat, "v": alpha * eps_hat - sigma * x0_hat}[target]
        losses[target] = objective(Fixed(guess), batch)
    snr = (alpha / sigma).square().flatten()
    torch.testing.assert_close(losses["eps"], snr * losses["x0"], rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["v"], (snr + 1) * losses["x0"], rtol=1e-9, atol=0)


# --- variational bound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
def test_the_bound_is_the_divergence_of_two_normals(cosine: bool) -> None:
    path, t = Diffusion(1000, cosine=cosine), torch.tensor([1, 5, 100, 500, 900, 999])
    name = "ddpm-cosine" if cosine else "ddpm-linear"
    (alpha, _), (alpha_before, _) = coefficients(name, t), coefficients(name, t - 1)
    beta = 1 - (alpha / alpha_before).square()
    variance = beta * (1 - alpha_before.square()) / (1 - alpha.square())
    x0, x_t, x0_hat, fraction = images(), images().flip(0), images() + 0.1, images().tanh()

    def mean(data: Tensor) -> Tensor:
        kept = (1 - beta).sqrt() * (1 - alpha_before.square()) / (1 - alpha.square())
        return alpha_before * beta / (1 - alpha.square()) * data + kept * x_t

    weight = (fraction + 1) / 2
    model = Normal(mean(x0_hat), (0.5 * (weight * beta.log() + (1 - weight) * variance.log())).exp())
    wanted = kl_divergence(Normal(mean(x0), variance.sqrt().expand_as(x0)), model).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(variational_bound(path, x0_hat, fraction, x0, x_t, t), wanted, rtol=1e-8, atol=1e-10)


def test_at_the_last_step_the_bound_is_a_distribution_over_8_bit_values() -> None:
    """The probabilities of all 256 values add up to 1; of each it is the normal's mass in its bin."""
    path = Diffusion(1000)
    values = torch.linspace(-1, 1, 256, dtype=torch.float64).view(-1, 1, 1, 1)
    like = torch.ones_like(values)
    bits = variational_bound(path, 0.2 * like, 0.5 * like, values, 0.25 * like, torch.zeros(256, dtype=torch.long))
    probability = 2**-bits
    # Values further than 7 standard deviations count 1e-12 each, so that their logarithm is finite.
    assert float(probability.sum()) == pytest.approx(1, abs=256e-12)
    low, high = path.at("log_variance", torch.zeros(1, dtype=torch.long), like), math.log(1e-4)
    normal = Normal(
        path.at("mean_x0", torch.zeros(1, dtype=torch.long), like) * 0.2, (0.5 * (0.75 * high + 0.25 * low)).exp()
    )
    mass = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    # Two tanh approximations of the normal distribution, each off by at most 2e-4 (Page 1977).
    assert float((probability - mass.flatten()).abs().max()) < 4e-4


def test_learned_variances_add_the_bound_and_leave_the_mean_alone() -> None:
    objective = Objective(ObjectiveConfig(learn_sigma=True))
    plain = Objective(ObjectiveConfig())
    batch = objective.draw(images(), labels(), generator(1))
    output = torch.cat([images() + 0.5, images().tanh()], 1).requires_grad_()
    losses, without = objective(Fixed(output), batch), plain(Fixed(output), batch)
    x0_hat = objective.path.to_x0("eps", output[:, :3], batch["x_t"], batch["t"])
    assert isinstance(objective.path, Diffusion)
    bound = variational_bound(objective.path, x0_hat, output[:, 3:], batch["x0"], batch["x_t"], batch["t"])
    torch.testing.assert_close(losses, without + bound, rtol=1e-12, atol=0)
    gradient, alone = (torch.autograd.grad(each.sum(), output, retain_graph=True)[0] for each in (losses, without))
    assert torch.equal(gradient[:, :3], alone[:, :3])
    assert gradient[:, 3:].flatten(1).any(1).all()


# --- times ----------------------------------------------------------------------------------------------------

COUNT = 40_000


def drawn(**options: Any) -> Tensor:
    config = ObjectiveConfig(**options)
    return draw_times(config, COUNT, device=torch.device("cpu"), dtype=torch.float64, generator=generator(3))


@pytest.mark.parametrize(
    ("options", "median"),
    [
        ({"path": "flow"}, 0.5),
        ({"path": "flow", "times": "logit-normal"}, 0.5),
        ({"path": "flow", "times": "logit-normal", "logit_mean": 1.0}, 1 / (1 + math.exp(-1))),
        ({"path": "flow", "shift": 3.0}, 0.75),
        ({"path": "additive", "times": "logit-normal", "shift": 3.0}, 0.75),
        ({"path": "ddpm-linear"}, 500),
        ({"path": "ddpm-linear", "times": "logit-normal", "shift": 3.0}, 750),
    ],
)
def test_medians_of_times(options: dict[str, Any], median: float) -> None:
    t = drawn(**options)
    # Five standard deviations of the share of 40,000 draws below the median.
    assert (t < median).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(COUNT))
    assert t.min() >= 0
    assert t.max() <= (999 if "ddpm" in options["path"] else 1)
    assert t.is_floating_point() != ("ddpm" in options["path"])


def test_logit_normal_times_have_its_spread() -> None:
    logits = torch.logit(drawn(path="flow", times="logit-normal", logit_std=0.7))
    # Five standard deviations of a standard deviation: sigma / sqrt(2 n).
    assert logits.std().item() == pytest.approx(0.7, abs=5 * 0.7 / math.sqrt(2 * COUNT))


def test_the_shift() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(shifted(t, 6.0), torch.tensor([0.0, 6 / 9, 6 / 7, 1.0]))
    assert shift_for(768 * 256) == pytest.approx(math.sqrt(48))


def test_the_last_time_is_a_step() -> None:
    """A continuous time of exactly 1 would be step S."""
    config = ObjectiveConfig(times="logit-normal", logit_mean=100.0)
    t = draw_times(config, 4, device=torch.device("cpu"), dtype=torch.float32, generator=generator())
    assert t.tolist() == [999] * 4


@pytest.mark.parametrize(
    ("path", "scale", "wanted"), [("flow", None, 1), ("additive", None, 1000), ("flow", 250.0, 250)]
)
def test_the_model_is_told_scaled_times(path: Any, scale: float | None, wanted: float) -> None:
    objective, model = Objective(ObjectiveConfig(path=path, time_scale=scale)), Fixed(images())
    batch = objective.draw(images(), labels(), generator(1))
    objective(model, batch)
    torch.testing.assert_close(model.inputs[1], wanted * batch["t"])


# --- units ----------------------------------------------------------------------------------------------------


def test_draws_of_an_image_are_averaged_and_share_its_label_and_its_drop() -> None:
    config = ObjectiveConfig(multiplicity=4, class_dropout_prob=0.5)
    objective = Objective(config)
    batch = objective.draw(images(50), labels(50), generator(1))
    units = objective.row_to_unit(batch)
    assert units is not None
    assert torch.equal(units, torch.arange(50).repeat_interleave(4))
    for name in ("y", "drop_labels"):
        assert (batch[name].view(50, 4) == batch[name].view(50, 4)[:, :1]).all()
    assert 0 < batch["drop_labels"].sum() < 200
    assert torch.equal(batch["x0"].view(50, 4, 3, 4, 4)[:, 2], images(50))
    assert batch["t"].view(50, 4).unique(dim=1).shape[1] == 4
    assert (batch["noise"].view(50, 4, -1)[:, 0] != batch["noise"].view(50, 4, -1)[:, 1]).all()
    rows = {name: value for name, value in batch.items() if name != "row_to_unit"}
    output = torch.zeros_like(batch["x0"])
    each = Objective(ObjectiveConfig())(Fixed(output), rows)
    torch.testing.assert_close(objective(Fixed(output), batch), each.view(50, 4).mean(1))


def test_images_of_a_set_share_a_time_and_the_divergence_is_added() -> None:
    config = ObjectiveConfig(set_size=3, multiplicity=2, kl_weight=0.5, context_shape=(7,))
    objective = Objective(config)
    sets = images(12).view(4, 3, 3, 4, 4)
    batch = objective.draw(sets, generator=generator(1))
    assert torch.equal(batch["x0"].view(4, 2, 3, 3, 4, 4)[:, 1], sets)
    assert (batch["t"].view(8, 3) == batch["t"].view(8, 3)[:, :1]).all()
    assert batch["context_noise"].shape == (24, 7)
    assert torch.equal(batch["row_to_unit"], torch.arange(4).repeat_interleave(6))
    assert all(len(value) == 24 for value in batch.values())
    output, kl = torch.zeros_like(batch["x0"]), torch.arange(24.0).double()
    model = Fixed((output, kl))
    losses = objective(model, batch)
    wanted = batch["noise"].square().mean((1, 2, 3)) + 0.5 * kl
    torch.testing.assert_close(losses, wanted.view(4, 6).mean(1))
    assert model.inputs[2] is batch["x0"]
    assert model.inputs[3] is batch["context_noise"]


def test_without_a_null_label_there_is_no_mask() -> None:
    objective, model = Objective(ObjectiveConfig(class_dropout_prob=None, metric="l1")), Fixed(images())
    batch = objective.draw(images(), labels(), generator(1))
    assert "drop_labels" not in batch
    assert objective(model, batch).shape == (6,)
    assert model.more == {"drop_labels": None}


@pytest.mark.parametrize("options", [{}, {"multiplicity": 3}])
def test_no_units(options: dict[str, int]) -> None:
    objective = Objective(ObjectiveConfig(**options))  # type: ignore[arg-type]
    batch = objective.draw(images(0), labels(0))
    assert objective(Fixed(images(0)), batch).shape == (0,)


def test_all_randomness_is_in_the_batch_and_half_outputs_become_float32() -> None:
    objective = Objective(ObjectiveConfig(path="flow", target="v", times="logit-normal"))
    first, second = (objective.draw(images().float(), labels(), generator(5)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    state = torch.get_rng_state()
    losses = objective(Fixed(images().bfloat16()), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "ddpm"}, "path: got 'ddpm'; accepted: ddpm-linear, ddpm-cosine, flow, additive"),
        ({"target": "noise"}, "target: got 'noise'; accepted: eps, v, x0"),
        ({"metric": "huber"}, "metric: got 'huber'; accepted: l2, l1"),
        ({"times": "cosine"}, "times: got 'cosine'; accepted: uniform, logit-normal"),
        ({"path": "flow", "learn_sigma": True}, "path='flow' has no variational bound"),
        ({"class_dropout_prob": 2.0}, "class_dropout_prob: got 2.0"),
        ({"shift": 0.0}, "shift: got 0.0"),
        ({"multiplicity": 0}, "multiplicity: got 0"),
        ({"set_size": 1}, "set_size: got 1"),
        ({"context_shape": (4,)}, "only models of sets"),
        ({"num_steps": 1}, "num_steps: got 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ObjectiveConfig(**options)
    assert "\n" not in str(caught.value)


def test_bad_units_are_named() -> None:
    plain, sets = Objective(ObjectiveConfig()), Objective(ObjectiveConfig(set_size=3))
    with pytest.raises(UsageError, match=r"x0: got \(2, 3, 3, 4, 4\); accepted: images"):
        plain.draw(images().view(2, 3, 3, 4, 4), labels(2))
    with pytest.raises(UsageError, match="labels: got None"):
        plain.draw(images())
    with pytest.raises(UsageError, match=r"x0: got \(3, 2, 3, 4, 4\); accepted: sets, shape \(U, 3, C, H, W\)"):
        sets.draw(images().view(3, 2, 3, 4, 4))
    with pytest.raises(UsageError, match="sets have no labels"):
        sets.draw(images().view(2, 3, 3, 4, 4), labels(2))
