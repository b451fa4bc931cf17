import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from dit_dp.clipping import attach
from dit_dp.errors import UsageError
from dit_dp.models import DiT
from dit_dp.models.dit import randomize_zero_init_
from dit_dp.objectives import PATHS, TARGETS, Objective, ObjectiveConfig
from dit_dp.sampling import SamplingConfig, evaluating, grid, labels_for, sample_from, save_grid, save_npz, to_uint8
from dit_dp.sampling.guidance import Condition, Denoiser
from dit_dp.sampling.noise import Streams
from dit_dp.sampling.sampler import iterate
from dit_dp.sampling.steps import DATA, ancestral_step, ddim_step, euler_step, level, time_grid
from dit_dp.training.ema import Ema
from dit_dp.workloads import WorkloadConfig
from tests.workload_models import CASES, DIT, build

MEAN, STD = 0.3, 0.4
DOUBLE = torch.float64


class OfGaussian(nn.Module):
    """The best predictor of an objective's target where each number of the data is N(MEAN, STD^2)."""

    def __init__(self, objective: Objective, num_steps: int = 1) -> None:
        super().__init__()
        self.objective = objective
        self.times = time_grid(objective.config, num_steps).tolist()
        self.weight = nn.Parameter(torch.zeros(1, dtype=DOUBLE))
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        config, path = self.objective.config, self.objective.path
        t = t if config.is_ddpm else t / config.scale_of_times
        alpha, sigma = path.signal(t, x), path.noise(t, x)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma
        output = path.target(config.target, x0, eps, t)
        return torch.cat([output, self.fraction(t[0]).expand_as(output)], 1) if config.learn_sigma else output

    def fraction(self, t: Tensor) -> Tensor:
        """Return where between the two fixed ones the variance of the reverse step from t is, on their log scale.

        It is the posterior's plus what is not known of x0, as the mean has it.
        """
        here, place = level(self.objective.path, t), self.times.index(t.item())
        if place == len(self.times) - 1:
            return torch.zeros(1)
        there = level(self.objective.path, torch.tensor(self.times[place + 1]))
        beta = 1 - (here.alpha / there.alpha) ** 2
        small = beta * there.sigma**2 / here.sigma**2
        unknown = STD**2 * here.sigma**2 / (here.alpha**2 * STD**2 + here.sigma**2)
        exact = small + (there.alpha * beta / here.sigma**2) ** 2 * unknown
        share = (math.log(exact) - math.log(small)) / (math.log(beta) - math.log(small))
        return torch.tensor([2 * share - 1], dtype=DOUBLE)


class Fixed(nn.Module):
    """Returns the same output for each row, by whether its label is dropped."""

    def __init__(self, labelled: Tensor, null: Tensor) -> None:
        super().__init__()
        self.labelled, self.null = labelled, null
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        drop = torch.zeros(len(x), dtype=torch.bool) if drop_labels is None else drop_labels
        return torch.where(drop.view(-1, 1, 1, 1), self.null, self.labelled)


def gaussian(config: ObjectiveConfig, count: int = 16, **sampling: Any) -> tuple[Tensor, Tensor]:
    """Return samples of the exact model and the noise that each started from."""
    objective = Objective(config)
    shape = (1, 32, 32)
    labels = torch.zeros(count, dtype=torch.int64)
    chosen = SamplingConfig(**sampling)
    model = OfGaussian(objective, chosen.num_steps)
    x = sample_from(model, objective, shape=shape, labels=labels, config=chosen)
    start = Streams(0, range(count), device=torch.device("cpu"), dtype=DOUBLE).normal(shape)
    return x, start


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def close_to_the_data(x: Tensor, mean: float = MEAN) -> None:
    """Mean and deviation of n numbers, each within 4 standard errors, plus what finite steps leave (1 %)."""
    n = x.numel()
    assert abs(x.mean().item() - mean) < 4 * STD / math.sqrt(n) + 0.01 * STD
    assert abs(x.std().item() / STD - 1) < 4 / math.sqrt(2 * n) + 0.01


# --- against a model that is exact --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", ["ddpm-linear", "ddpm-cosine"])
def test_ancestral_samples_have_the_data_s_moments(path: str, target: str) -> None:
    """However few steps: the model knows the variance of each, and the reverse step of a Gaussian is one."""
    config = ObjectiveConfig(path=path, target=target, learn_sigma=True)  # type: ignore[arg-type]
    close_to_the_data(gaussian(config, sampler="ancestral", num_steps=12)[0])


@pytest.mark.parametrize("path", ["ddpm-linear", "ddpm-cosine"])
def test_fixed_variances_are_too_small_and_too_large(path: str) -> None:
    """The posterior's is that of data that are a point, beta that of data that are noise; more steps help both."""
    config, spread = ObjectiveConfig(path=path), {}  # type: ignore[arg-type]
    for steps in (20, 80):
        for variance in ("small", "large"):
            x, _ = gaussian(config, sampler="ancestral", num_steps=steps, variance=variance)
            spread[variance, steps] = x.std().item() / STD
    assert spread["small", 20] < spread["small", 80] < 1 < spread["large", 80] < spread["large", 20]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", PATHS)
def test_ddim_follows_the_known_ode(path: str, target: str) -> None:
    """On it, a number's distance from the mean in standard deviations never changes."""
    config = ObjectiveConfig(path=path, target=target, num_steps=400)  # type: ignore[arg-type]
    x, start = gaussian(config, count=2, sampler="ddim", num_steps=400)
    first = level(Objective(config).path, time_grid(config, 400)[0])
    deviation = math.sqrt((first.alpha * STD) ** 2 + first.sigma**2)
    expected = MEAN + STD * (start[:2] - first.alpha * MEAN) / deviation
    # Steps of first order: the error falls with their number; the bound is 1 % of the data's deviation.
    torch.testing.assert_close(x, expected, rtol=0.01, atol=0.01 * STD)


@pytest.mark.parametrize("path", ["flow", "additive"])
@pytest.mark.parametrize("target", TARGETS)
def test_euler_is_ddim_on_straight_lines(path: str, target: str) -> None:
    config = ObjectiveConfig(path=path, target=target, shift=3.0)  # type: ignore[arg-type]
    one, _ = gaussian(config, count=2, sampler="euler", num_steps=7)
    other, _ = gaussian(config, count=2, sampler="ddim", num_steps=7)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_ddim_with_all_the_noise_nears_the_data_s_moments(path: str) -> None:
    """Its variance is the posterior's, too small but in the limit of many steps: the error falls with their number."""
    config = ObjectiveConfig(path=path, target="v")  # type: ignore[arg-type]
    additive, errors = path == "additive", []
    # On the additive path data still stand at time 1: their spread is in the scale, of their mean a part is lost.
    mean, scale = (MEAN / (1 + STD**2), math.sqrt(1 + STD**2)) if additive else (MEAN, 1.0)
    for steps in (20, 80):
        x, _ = gaussian(config, sampler="ddim", num_steps=steps, eta=1.0, start_scale=scale)
        assert abs(x.mean().item() - mean) < 4 * STD / math.sqrt(x.numel()) + 0.01 * STD
        errors.append(abs(x.std().item() / STD - 1))
    assert errors[1] < max(errors[0] / 2, 4 / math.sqrt(2 * x.numel()))


def test_clamped_samples_stay_in_range() -> None:
    """STD is 0.4 around 0.3: without a bound about 4 % are above 1."""
    config = ObjectiveConfig(num_steps=50)
    free, _ = gaussian(config, num_steps=50)
    bound, _ = gaussian(config, num_steps=50, clamp=True)
    assert free.max() > 1
    assert bound.abs().max() <= 1


# --- against diffusers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "large", "learned"])
@pytest.mark.parametrize("clamp", [False, True])
def test_an_ancestral_step_is_diffusers_ddpm(kind: str, clamp: bool) -> None:
    """Theirs computes its tables in float32: 1e-4 of the values."""
    types = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
    theirs = DDPMScheduler(1000, 1e-4, 0.02, variance_type=types[kind], clip_sample=clamp, timestep_spacing="linspace")
    objective = Objective(ObjectiveConfig(learn_sigma=kind == "learned"))
    theirs.set_timesteps(20)
    times = time_grid(objective.config, 20)
    assert times.tolist() == theirs.timesteps.tolist()
    x, output = normal(2, 3, 4, 4).float(), normal(2, 6 if kind == "learned" else 3, 4, 4, seed=1).float()
    for place in (0, 9, 19):
        here = level(objective.path, times[place])
        there = level(objective.path, times[place + 1]) if place < 19 else DATA
        z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        expected = theirs.step(output, int(times[place]), x, generator=torch.Generator().manual_seed(3)).prev_sample
        x0 = objective.path.to_x0("eps", output[:, :3], x, times[place].expand(2))
        x0 = x0.clamp(-1, 1) if clamp else x0
        ours = ancestral_step(x, x0, here, there, z=z, variance=kind, fraction=output[:, 3:])  # type: ignore[arg-type]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_ddim_step_is_diffusers_ddim(eta: float) -> None:
    """Theirs takes the step before from a fixed distance: steps of the trailing spacing agree."""
    theirs = DDIMScheduler(
        1000, 1e-4, 0.02, clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    objective = Objective(ObjectiveConfig(target="v"))
    theirs.set_timesteps(20)
    x, output, z = (normal(2, 3, 4, 4, seed=seed).float() for seed in range(3))
    for place in (0, 9, 18):
        t, after = (theirs.timesteps[place + more] for more in (0, 1))
        expected = theirs.step(output, int(t), x, eta=eta, variance_noise=z if eta else None).prev_sample
        at = t.expand(2)
        x0, eps = objective.path.to_x0("v", output, x, at), objective.path.to_eps("v", output, x, at)
        ours = ddim_step(x0, eps, level(objective.path, t), level(objective.path, after), eta=eta, z=z)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers_flow_matching(shift: float) -> None:
    """With the grid said, as theirs ends at one step of its thousand before it ends at the data."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
    times = time_grid(ObjectiveConfig(path="flow", target="v", shift=shift), 10)
    torch.testing.assert_close(times.float(), theirs.sigmas[:-1], rtol=1e-6, atol=0)
    x = y = normal(2, 3, 4, 4).float()
    for place, t in enumerate(theirs.timesteps):
        velocity = (y - 0.5) * times[place].item()
        x = theirs.step(velocity, t, x).prev_sample
        y = euler_step(y, velocity, times[place].item(), [*times.tolist(), 0.0][place + 1])
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


# --- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 37, 250, 1000])
def test_steps_of_a_ddpm_fall_from_the_last_and_are_all_different(number: int) -> None:
    times = time_grid(ObjectiveConfig(), number).tolist()
    assert times[0] == 999
    assert times == sorted(set(times), reverse=True)
    assert len(times) == number
    assert times[-1] == (0 if number > 1 else 999)


def test_times_of_a_flow_are_shifted_as_in_training() -> None:
    times = time_grid(ObjectiveConfig(path="flow", target="v", shift=4.0), 4).tolist()
    assert times == pytest.approx([1.0, 3 / 3.25, 2 / 2.5, 1 / 1.75])
    assert time_grid(ObjectiveConfig(path="flow", target="eps"), 4)[0] == 0.999


# --- guidance -----------------------------------------------------------------------------------------------------


def ask(channels: str, scale: float, learn_sigma: bool) -> tuple[Tensor, Tensor | None, Fixed, Tensor, Tensor]:
    width = 8 if learn_sigma else 4
    labelled, null = normal(1, width, 2, 2), normal(1, width, 2, 2, seed=1)
    model = Fixed(labelled, null)
    config = ObjectiveConfig(learn_sigma=learn_sigma)
    denoiser = Denoiser(model, config, cfg_scale=scale, guide_channels=channels)  # type: ignore[arg-type]
    found = denoiser(normal(1, 4, 2, 2), torch.tensor(3), Condition(labels=torch.zeros(1, dtype=torch.int64)))
    return *found, model, labelled, null


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("channels", ["3", "all"])
def test_guidance_moves_the_channels_it_is_asked_to(channels: str, learn_sigma: bool) -> None:
    prediction, fraction, model, labelled, null = ask(channels, 3.0, learn_sigma)
    moved = 3 if channels == "3" else 4
    expected = null[:, :moved] + 3 * (labelled[:, :moved] - null[:, :moved])
    torch.testing.assert_close(prediction[:, :moved], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction[:, moved:], labelled[:, moved:4], rtol=1e-6, atol=1e-6)
    assert (fraction is not None) == learn_sigma
    if fraction is not None:
        torch.testing.assert_close(fraction, labelled[:, 4:], rtol=1e-6, atol=1e-6)
    assert model.calls == 1


def test_without_guidance_the_model_runs_once_on_the_rows_there_are() -> None:
    objective = Objective(ObjectiveConfig(num_steps=100))
    for scale, rows in ((1.0, 3), (2.0, 6)):
        model = OfGaussian(objective)
        chosen = SamplingConfig(num_steps=5, cfg_scale=scale)
        sample_from(model, objective, shape=(1, 4, 4), labels=torch.zeros(3, dtype=torch.int64), config=chosen)
        assert model.rows == [rows] * 5


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_samples_of_every_system(name: str) -> None:
    model, config = build(name).eval(), CASES[name][2]
    shape = (model.in_channels, model.input_size, model.input_size)
    sampler = "ddim" if config.set_size else "ancestral" if config.is_ddpm else "euler"
    scale = 2.0 if config.class_dropout_prob and not config.set_size else 1.0
    given: dict[str, Any] = {"labels": torch.arange(5)}
    if config.set_size:
        given = {"context": normal(5, config.set_size - 1, *shape).float()}
    chosen = SamplingConfig(sampler=sampler, num_steps=3, cfg_scale=scale)  # type: ignore[arg-type]
    found = [
        sample_from(model, Objective(config), shape=shape, config=chosen, batch_size=size, seed=4, **given)
        for size in (5, 2)
    ]
    assert found[0].shape == (5, *shape)
    assert found[0].isfinite().all()
    assert not torch.allclose(found[0][0], found[0][1])
    # Rounding of a matrix product depends on how many rows it has, and three steps of a tiny model keep it tiny.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * found[0].abs().max().item())


def test_what_a_set_is_given_matters() -> None:
    model, config = build("set film").eval(), CASES["set film"][2]
    shape, context = (3, 8, 8), normal(2, 2, 3, 8, 8).float()
    context[1] = context[0]
    chosen = SamplingConfig(sampler="ddim", num_steps=3)

    def first(context: Tensor) -> Tensor:
        return sample_from(model, Objective(config), shape=shape, context=context, config=chosen)[0]

    assert torch.equal(first(context), first(context))
    assert not torch.allclose(first(context), first(context + 1))


def tiny() -> tuple[DiT, Objective]:
    torch.manual_seed(0)
    model = randomize_zero_init_(DiT(**DIT, learn_sigma=False), torch.Generator().manual_seed(1), std=0.1)
    return model, Objective(ObjectiveConfig(num_steps=100))


def draw(model: nn.Module, objective: Objective, count: int = 3, **more: Any) -> Tensor:
    labels = torch.arange(10)[:count] % 5
    labels = more.pop("labels", labels)
    config = SamplingConfig(num_steps=4)
    return sample_from(model, objective, shape=(4, 8, 8), labels=labels, config=config, **more)


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    objective = Objective(ObjectiveConfig(num_steps=100))
    model = OfGaussian(objective)  # elementwise, so that batch sizes leave no rounding
    whole = draw(model, objective, 7, batch_size=7)
    assert torch.equal(whole, draw(model, objective, 7, batch_size=3))
    assert torch.equal(whole[:4], draw(model, objective, 4))
    assert torch.equal(whole[4:], draw(model, objective, 3, first=4))
    assert not torch.equal(whole, draw(model, objective, 7, seed=1))
    assert len({tuple(row.flatten().tolist()) for row in (*whole, *draw(model, objective, 7, seed=1))}) == 14


def test_latents_are_decoded_batch_by_batch() -> None:
    model, objective = tiny()
    seen: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    images = draw(model, objective, 5, batch_size=2, decode=decode)
    assert images.shape == (5, 3, 64, 64)
    assert seen == [2, 2, 1]


def test_sampling_leaves_gradients_to_its_caller() -> None:
    model, objective = tiny()
    labels, config = torch.zeros(2, dtype=torch.int64), SamplingConfig(num_steps=2)
    for x in iterate(model, objective, shape=(4, 8, 8), labels=labels, config=config, batch_size=1):
        assert torch.is_grad_enabled()
        assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "vanilla"])
def test_sampling_between_steps_changes_no_private_gradient(method: str) -> None:
    def gradient(sampled: bool) -> list[Tensor]:
        model, objective = tiny()
        engine = attach(model, method, max_grad_norm=1.0)
        batch = objective.draw(normal(3, 4, 8, 8).float(), torch.arange(3), torch.Generator().manual_seed(0))
        if sampled:
            with evaluating(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()}):
                draw(model, objective)
        engine.accumulate(objective, batch)
        engine.privatize(noise_multiplier=0.0, expected_batch_size=1)
        return [p.grad.clone() for p in engine.parameters.values() if p.grad is not None]

    assert all(torch.equal(one, other) for one, other in zip(gradient(False), gradient(True), strict=True))


def test_bf16_models_are_sampled_in_float32() -> None:
    model, objective = tiny()
    assert draw(model.bfloat16(), objective).dtype == torch.float32


# --- weights ------------------------------------------------------------------------------------------------------


def test_averages_are_sampled_from_and_everything_comes_back() -> None:
    model, objective = tiny()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    ema = Ema(model.parameters(), 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
        next(model.parameters()).view(-1)[0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = [p.data_ptr() for p in model.parameters()]
    averages = dict(zip(before, ema.tensors, strict=True))
    with evaluating(model, averages) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
        assert all(torch.equal(p, averages[name]) for name, p in model.named_parameters())
        assert draw(model, objective).isfinite().all()
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    assert modes == [module.training for module in model.modules()]
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_weights_come_back_after_an_error() -> None:
    model, _ = tiny()
    name, parameter = next(iter(model.named_parameters()))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model, {name: torch.zeros_like(parameter)}):
        raise RuntimeError("stop")
    assert torch.equal(parameter, before)
    assert model.training


@pytest.mark.parametrize(
    ("averages", "words"),
    [({"nothing": torch.zeros(1)}, "nothing"), ({"x_embedder.proj.bias": torch.zeros(1)}, "shape")],
)
def test_averages_of_another_model_are_refused(averages: dict[str, Tensor], words: str) -> None:
    model, _ = tiny()
    with pytest.raises(UsageError, match=words), evaluating(model, averages):
        pass


# --- pictures and files -------------------------------------------------------------------------------------------


def test_pixels_come_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = to_uint8(pixels.float() / 127.5 - 1)
    assert torch.equal(found, pixels.permute(0, 2, 3, 1))
    outside = to_uint8(torch.tensor([-3.0, 3.0, float("nan"), float("inf")]).view(1, 1, 2, 2))
    assert outside.flatten().tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_has_each_sample_at_its_place(channels: int, tmp_path: Path) -> None:
    samples = torch.stack([torch.full((channels, 4, 6), value / 127.5 - 1) for value in (10, 20, 30, 40, 50)])
    picture = grid(samples, columns=3, padding=1)
    assert picture.size == (3 * 7 + 1, 2 * 5 + 1)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture).reshape(11, 22, channels)
    assert [int(pixels[2 + 5 * row, 2 + 7 * column, 0]) for row in (0, 1) for column in (0, 1, 2)] == [
        10,
        20,
        30,
        40,
        50,
        0,
    ]
    path = save_grid(samples, tmp_path / "new" / "grid.png", columns=3, padding=1)
    with Image.open(path) as file:
        assert np.array_equal(np.asarray(file), np.asarray(picture))
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_npz_is_adm_s(tmp_path: Path) -> None:
    samples = normal(5, 3, 4, 4).float()
    path = save_npz(samples, tmp_path / "samples.npz", torch.arange(5))
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], to_uint8(samples).numpy())
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4]


# --- the user's mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "objective", "words"),
    [
        ({"cfg_scale": 2.0}, {"class_dropout_prob": None}, "null label"),
        ({"cfg_scale": 2.0}, {"class_dropout_prob": 0.0}, "null label"),
        ({"sampler": "euler"}, {}, "ancestral, ddim"),
        ({"sampler": "ancestral"}, {"path": "flow"}, "euler, ddim"),
        ({"num_steps": 1001}, {}, "at most 1000"),
        ({"variance": "learned"}, {}, "predicts no variances"),
    ],
)
def test_what_a_model_cannot_do_is_refused(config: dict[str, Any], objective: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SamplingConfig(**config).check(ObjectiveConfig(**objective))


@pytest.mark.parametrize(
    "config",
    [
        {"sampler": "heun"},
        {"num_steps": 0},
        {"eta": 0.5},
        {"eta": 1.5, "sampler": "ddim"},
        {"cfg_scale": float("nan")},
        {"cfg_scale": -1.0},
        {"guide_channels": "2"},
        {"variance": "none"},
        {"variance": "small", "sampler": "ddim"},
    ],
)
def test_values_that_are_not_accepted(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplingConfig(**config)


def test_conditions_that_do_not_fit_are_refused() -> None:
    model, objective = tiny()
    sets, of_sets = build("set film"), Objective(CASES["set film"][2])
    with pytest.raises(UsageError, match="label for each sample"):
        sample_from(model, objective, shape=(4, 8, 8), config=SamplingConfig(num_steps=2))
    with pytest.raises(UsageError, match="model is of sets"):
        sample_from(sets, of_sets, shape=(4, 8, 8), labels=torch.zeros(2))
    with pytest.raises(UsageError, match=r"\(N, 2, 4, 8, 8\)"):
        sample_from(sets, of_sets, shape=(4, 8, 8), context=torch.zeros(2, 3, 4, 8, 8))
    with pytest.raises(UsageError, match="labels from 0 to 9"):
        labels_for(4, 10, (3, 10))
    assert labels_for(5, 10, (3, 7)).tolist() == [3, 7, 3, 7, 3]
    assert labels_for(4, 3).tolist() == [0, 1, 2, 0]


def test_pictures_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="front-end"):
        grid(torch.zeros(2, 4, 8, 8))
    with pytest.raises(UsageError, match="at least one"):
        grid(torch.zeros(0, 3, 8, 8))
    with pytest.raises(UsageError, match="labels"):
        save_npz(torch.zeros(2, 3, 8, 8), tmp_path / "a.npz", torch.zeros(3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        save_grid(torch.zeros(2, 3, 8, 8), tmp_path / "file" / "grid.png")


@pytest.mark.parametrize(
    ("workload", "objective", "sampler", "steps", "clamp"),
    [
        ("dit", (), "ancestral", 250, False),
        ("set", (), "ddim", 100, True),
        ("ddt", (), "euler", 50, False),
        ("ddt", ("path=ddpm-linear",), "ancestral", 50, False),
        ("panda", (), "ancestral", 1000, True),
        ("panda", ("path=flow", "target=v"), "euler", 1000, True),
        ("dit", ("num_steps=100",), "ancestral", 100, False),
    ],
)
def test_a_workload_s_own_way(workload: str, objective: tuple[str, ...], sampler: str, steps: int, clamp: bool) -> None:
    more = {"learn_sigma": False} if objective and workload == "dit" else {}
    spec = WorkloadConfig(workload=workload, objective=objective, **more).spec  # type: ignore[arg-type]
    config = SamplingConfig.of(spec, num_steps=None)
    assert (config.sampler, config.num_steps, config.clamp) == (sampler, steps, clamp)
    config.check(spec.objective)
    assert SamplingConfig.of(spec, num_steps=7).num_steps == 7
