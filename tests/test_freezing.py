"""What a phase does not train does not move: not by a bit, under noise, weight decay and momentum."""

import io
import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.errors import EngineStateError, UnsupportedModelError, UsageError
from dit_dp.models import DiTHuggingFaceWrapper
from dit_dp.models.dit import DiT, randomize_zero_init_
from dit_dp.objectives import Objective
from dit_dp.training import PhaseRunner, Schedule, train_step
from dit_dp.training.groups import groups_of
from dit_dp.training.schedule import PRESETS, Phase
from tests import workload_models
from tests.models import DIFFUSERS

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=1e-3, weight_decay=0.1, momentum=0.9),
}
OURS = [name for name, method in METHODS.items() if not method.peer and name != "ghost_fsdp_bk"]

TRAINS: dict[str, dict[str, tuple[str, int]]] = {
    "dit": {
        "full": (r"(?!pos_embed)", 31),
        "attention": (r"blocks\.\d\.attn\.(qkv|proj)\.", 8),
        "bias_norm": (r".*\.bias$", 15),
        "adaln": (r"(blocks\.\d|final_layer)\.adaLN_modulation\.1\.", 6),
        "head": (r"final_layer\.", 4),
        "lora(2)": (r"blocks\.\d\.attn\.(qkv|proj)\.lora_[AB]\.", 8),
    },
    "diffusers": {
        "full": (r"", 44),
        "attention": (r"model\.transformer_blocks\.\d\.attn1\.to_(q|k|v|out\.0)\.", 16),
        "bias_norm": (r".*\.bias$", 21),
        "adaln": (r"model\.(transformer_blocks\.\d\.norm1\.linear|proj_out_1)\.", 6),
        "head": (r"model\.proj_out_[12]\.", 4),
        "lora(2)": (r"model\.transformer_blocks\.\d\.attn1\.to_(q|k|v|out\.0)\.lora_[AB]\.", 16),
    },
    "x2": {
        "full": (r"(?!pos_embed)", 50),
        "x2": (r"x2_|final_layer\.", 23),
        "attention": (r"(blocks\.\d|x2_vit_block)\.attn\.(qkv|proj)\.", 12),
        "bias_norm": (r".*\.bias$|x2_vit_block\.norm[12]\.weight", 26),
        "adaln": (r"(blocks\.\d|final_layer)\.adaLN_modulation\.1\.", 6),
        "head": (r"final_layer\.", 4),
        "lora(2)": (r"(blocks\.\d|x2_vit_block)\.attn\.(qkv|proj)\.lora_[AB]\.", 12),
    },
    "x2 averaged": {
        "x2": (r"x2_|final_layer\.", 20),
        "adaln": (r"((blocks\.\d|final_layer)\.adaLN_modulation|x2_modulation)\.1\.", 8),
    },
    "ddt normed": {
        "full": (r"(?!pos_embed|t_embedder\.W)", 58),
        "encoder_then_full(3)": (r"(s_embedder|t_embedder\.mlp|y_embedder|blocks\.[01])\.", 35),
        "attention": (r"blocks\.\d\.attn\.(qkv|proj|q_norm|k_norm)\.", 18),
        "bias_norm": (r".*\.bias$|.*norm(1|2|_final)?\.weight", 35),
        "adaln": (r"(blocks\.\d|final_layer)\.adaLN_modulation\.1\.", 8),
        "head": (r"final_layer\.", 5),
        "lora(2)": (r"blocks\.\d\.attn\.(qkv|proj)\.lora_[AB]\.", 12),
    },
    "set lag": {
        "full": (r"(?!dit\.pos_embed)", 76),
        "encoder_then_full(3)": (r"(encoder|time_embed)\.", 34),
        "attention": (r"(dit|encoder)\.blocks\.\d\.(attn|cross)\.", 28),
        "bias_norm": (r".*\.bias$|encoder\.(blocks\.\d\.norm[12]|norm)\.weight", 42),
        "lora(2)": (r"(dit|encoder)\.blocks\.\d\.(attn\.(qkv|proj)|cross\.(q|kv|proj))\.lora_[AB]\.", 28),
        "adaln": (r"dit\.(blocks\.\d|final_layer)\.adaLN_modulation\.1\.", 6),
    },
    "set variational": {"encoder_then_full(3)": (r"(encoder|time_embed|posterior)\.", 38)},
    "panda": {
        "full": (r"", 66),
        "attention": (r"blocks\.\d\.attn\.(qkv|proj)\.", 8),
        "bias_norm": (r".*\.bias$|.*norm(1|2|_final)\.weight", 37),
        "adaln": (r"blocks\.\d\.(shift|scale|gate)_(msa|mlp)\.", 24),
        "head": (r"(norm_final|linear)\.", 4),
        "lora(2)": (r"blocks\.\d\.attn\.(qkv|proj)\.lora_[AB]\.", 8),
    },
}
"""For a model and a preset: what the names that train look like, and how many there are."""

CASES = [(model, preset) for model, presets in TRAINS.items() for preset in presets]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    diffusers.DiTTransformer2DModel(**DIFFUSERS).save_pretrained(path)
    return path


class Case:
    """A model, and steps on batches that stay the same."""

    def __init__(self, name: str, checkpoint: Path | None = None) -> None:
        self.name = name
        torch.manual_seed(0)
        if name in workload_models.CASES:
            self.model: nn.Module = workload_models.build(name)
            self.objective, self.batch, self.row_to_unit = workload_models.draw(name)
            return
        if name == "dit":
            self.model = DiT(**workload_models.DIT)
        else:
            self.model = DiTHuggingFaceWrapper(str(checkpoint), img_size=64, num_classes=10, pretrained=True)
        randomize_zero_init_(self.model.train(), torch.Generator().manual_seed(1), std=0.1)
        self.objective = Objective(workload_models.EPS)
        generator = torch.Generator().manual_seed(2)
        x0 = torch.randn(workload_models.UNITS, 4, 8, 8, generator=generator)
        self.batch = self.objective.draw(x0, torch.arange(workload_models.UNITS), generator)
        self.row_to_unit = None

    def runner(self, schedule: Schedule | str, method: str = "bookkeeping", **options: Any) -> PhaseRunner:
        schedule = Schedule.preset(schedule) if isinstance(schedule, str) else schedule
        settings = {"attach": partial(attach, method=method), "make_optimizer": OPTIMIZERS["adamw"], **options}
        return PhaseRunner(self.model, schedule, **settings)

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def moved(self, before: dict[str, Tensor]) -> set[str]:
        return {name for name, p in self.model.named_parameters() if not torch.equal(p, before[name])}

    def step(self, runner: PhaseRunner, noise: float = 0.5) -> Tensor | None:
        noise = noise if runner.engine.private else 0.0
        return train_step(
            runner.engine,
            runner.optimizer,
            self.objective,
            [self.batch],
            noise_multiplier=noise,
            expected_batch_size=workload_models.UNITS,
            ema=runner.ema,
            on_phase=runner.on_phase,
            row_to_unit=self.objective.row_to_unit,
        )

    def train(self, runner: PhaseRunner, first: int, last: int) -> None:
        for step in range(first, last + 1):
            runner.apply(step)
            self.step(runner)


def needs(preset: str) -> None:
    if preset.startswith("lora"):
        pytest.importorskip("peft")


def matching(model: nn.Module, pattern: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if re.match(pattern, name)}


def state_of(runner: PhaseRunner) -> dict[str, dict[str, Tensor]]:
    """Copy the optimizer's state, by name; it must hold what trains, in the engine's order, and no other's state."""
    names = {id(p): name for name, p in runner.engine.parameters.items()}
    assert [id(p) for group in runner.optimizer.param_groups for p in group["params"]] == list(names)
    assert {id(p) for p in runner.optimizer.state} <= set(names)
    return {names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in runner.optimizer.state.items()}


def drifted(runner: PhaseRunner, averages: dict[str, Tensor]) -> set[str]:
    return {name for name in averages if not torch.equal(averages[name], runner.averages[name])}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "preset"), CASES, ids=[f"{name} {preset}" for name, preset in CASES])
def test_exactly_what_a_preset_trains_moves(name: str, preset: str, optimizer: str, checkpoint: Path) -> None:
    needs(preset)
    case = Case(name, checkpoint)
    runner = case.runner(preset, make_optimizer=OPTIMIZERS[optimizer], ema_decay=0.5)
    pattern, count = TRAINS[name][preset]
    wanted, before = matching(case.model, pattern), case.values()
    assert len(wanted) == count
    case.train(runner, 1, 3)
    assert case.moved(before) == wanted
    assert set(runner.engine.parameters) == set(runner.averages) == set(state_of(runner)) == wanted
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("method", OURS)
def test_every_method_crosses_the_border_of_a_staged_freeze(method: str) -> None:
    case = Case("set film")
    runner = case.runner("encoder_then_full(2)", method)
    encoder, before = matching(case.model, r"(encoder|time_embed)\."), case.values()
    case.train(runner, 1, 2)
    assert case.moved(before) == encoder
    between = case.values()
    case.train(runner, 3, 3)
    everything = set(between) - {"dit.pos_embed"}
    assert case.moved(between) == everything if method != "vanilla" else case.moved(between) >= encoder


@pytest.mark.parametrize("method", ["opacus", "opacus-ghost"])
def test_peers_cross_borders(method: str) -> None:
    case = Case("dit")
    phases = (Phase(groups=("head",), end=1), Phase(groups=("all",), start=2))
    runner = case.runner(Schedule(phases=phases), method)
    before = case.values()
    case.train(runner, 1, 1)
    assert case.moved(before) == matching(case.model, r"final_layer\.")
    between = case.values()
    case.train(runner, 2, 2)
    assert case.moved(between) == set(between) - {"pos_embed"}


@pytest.mark.parametrize("name", ["dit", "diffusers", "x2", "ddt normed", "set lag", "panda"])
def test_every_preset_that_applies_to_a_model_is_held(name: str, checkpoint: Path) -> None:
    groups = groups_of(Case(name, checkpoint).model)
    texts = [preset.replace("(N)", "(3)").replace("(R)", "(2)") for preset in PRESETS]
    apply = [
        text for text in texts if text == "lora(2)" or set(Schedule.preset(text).phases[0].groups) <= groups.keys()
    ]
    assert set(TRAINS[name]) == set(apply)


@pytest.mark.parametrize(("name", "preset"), CASES, ids=[f"{name} {preset}" for name, preset in CASES])
def test_frozen_parameters_have_no_share_in_the_norm(name: str, preset: str, checkpoint: Path) -> None:
    needs(preset)
    case = Case(name, checkpoint)
    engine = case.runner(preset).engine
    norms = engine.accumulate(case.objective, case.batch, case.row_to_unit)
    assert norms is not None
    engine.detach()
    trains = [p for name, p in case.model.named_parameters() if re.match(TRAINS[case.name][preset][0], name)]
    losses = case.objective(case.model, case.batch)
    for loss, norm in zip(losses, norms, strict=True):
        grads = torch.autograd.grad(loss, trains, retain_graph=True, allow_unused=True)
        exact = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        torch.testing.assert_close(exact, norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_trains_on_keeps_its_state_and_what_freezes_loses_it(optimizer: str) -> None:
    """Everything, then the head, then everything: a parameter frozen with momentum stays where it was."""
    case = Case("dit")
    phases = (Phase(groups=("all",), end=2), Phase(groups=("head",), start=3, end=4), Phase(groups=("all",), start=5))
    runner = case.runner(Schedule(phases=phases), make_optimizer=OPTIMIZERS[optimizer], ema_decay=0.5)
    case.train(runner, 1, 2)
    head, everything = matching(case.model, r"final_layer\."), set(runner.engine.parameters)
    before, state = case.values(), state_of(runner)
    averages = {name: average.clone() for name, average in runner.averages.items()}
    assert runner.apply(3)
    assert not drifted(runner, averages)
    kept = state_of(runner)
    assert set(kept) == head
    assert all(same_state(kept[name], state[name]) for name in head)
    case.train(runner, 3, 4)
    assert case.moved(before) == head
    assert drifted(runner, averages) == head
    averages, state = {name: average.clone() for name, average in runner.averages.items()}, state_of(runner)
    assert runner.apply(5)
    assert not drifted(runner, averages)
    kept = state_of(runner)
    assert set(kept) == head
    assert all(same_state(kept[name], state[name]) for name in head)
    assert set(runner.engine.parameters) == everything == set(runner.averages)
    case.train(runner, 5, 5)
    assert set(state_of(runner)) == everything
    if optimizer == "adamw":
        assert {name: int(s["step"]) for name, s in state_of(runner).items() if name in head} == dict.fromkeys(head, 5)
        assert {int(s["step"]) for name, s in state_of(runner).items() if name not in head} == {1}


def test_masters_of_half_precision_cross_the_border_unrounded() -> None:
    case = Case("dit")
    case.model.to(torch.bfloat16)
    case.batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.batch.items()}
    phases = (Phase(groups=("all",), end=2), Phase(groups=("head",), start=3))
    runner = case.runner(Schedule(phases=phases), ema_decay=0.5)
    case.train(runner, 1, 2)
    masters = {name: p.detach().clone() for name, p in runner.engine.parameters.items()}
    state = state_of(runner)
    runner.apply(3)
    for name, master in runner.engine.parameters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, masters[name])
        assert same_state(state_of(runner)[name], state[name])
    assert any(not torch.equal(master, master.bfloat16().float()) for master in runner.engine.parameters.values())
    before = case.values()
    case.train(runner, 3, 12)
    assert case.moved(before) == matching(case.model, r"final_layer\.")


def test_a_run_resumed_at_the_border_is_the_run_that_went_on() -> None:
    def start(step: int = 1) -> tuple[Case, PhaseRunner]:
        case = Case("set film")
        return case, case.runner("encoder_then_full(2)", ema_decay=0.5, step=step)

    def go_on(case: Case, runner: PhaseRunner) -> None:
        for step in (3, 4):
            runner.apply(step)
            case.step(runner, noise=0.0)

    case, runner = start()
    for step in (1, 2):
        runner.apply(step)
        case.step(runner, noise=0.0)
    weights, averages = case.values(), {name: average.clone() for name, average in runner.averages.items()}
    torch.save(runner.optimizer.state_dict(), buffer := io.BytesIO())
    go_on(case, runner)
    again, resumed = start(step=2)
    again.model.load_state_dict(weights, strict=False)
    buffer.seek(0)
    resumed.optimizer.load_state_dict(torch.load(buffer))
    resumed.load_averages(averages)
    go_on(again, resumed)
    assert not again.moved(case.values())
    assert all(torch.equal(average, resumed.averages[name]) for name, average in runner.averages.items())


def test_a_staged_freeze_says_where_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    case = Case("set film")
    runner = case.runner("encoder_then_full(3)")
    assert "FROZEN_DiT from step 1 to 3: encoder" in caplog.text
    case.train(runner, 1, 2)
    values = runner.log_values(case.model.context(case.batch["x0"], case.batch["t"]))
    assert values["training_mode"] == "FROZEN_DiT (step 2/3)"
    assert (values["debug/dit_frozen"], values["debug/encoder_frozen"]) == (1.0, 0.0)
    assert values["debug/grad_norm_dit"] == 0.0
    assert float(values["debug/grad_norm_encoder"]) > 0
    assert {key for key in values if "context" in key} == {
        f"debug/context_{what}" for what in ("mean", "std", "norm", "spread")
    }
    caplog.clear()
    case.train(runner, 3, 4)
    assert "FROZEN_DiT ends after step 3; unfrozen: DiT" in caplog.text
    assert "FULL from step 4 on: all" in caplog.text
    values = runner.log_values()
    assert (values["training_mode"], values["debug/dit_frozen"]) == ("FULL", 0.0)
    assert float(values["debug/grad_norm_dit"]) > 0


def test_a_phase_that_cuts_across_parts_says_so() -> None:
    assert Case("dit").runner("attention").training_mode == "PARTIAL_attention (step 1)"
    assert Case("x2").runner("x2").training_mode == "FROZEN_backbone (step 1)"


def test_contexts_are_what_the_set_model_conditions_on() -> None:
    for name, shape in (("set film", (12, 16)), ("set variational", (24, 16, 16))):
        case = Case(name)
        assert case.model.context(case.batch["x0"], case.batch["t"]).shape == shape


def test_a_border_within_a_step_is_refused_and_leaves_the_phase() -> None:
    case = Case("set film")
    runner = case.runner("encoder_then_full(1)")
    runner.engine.accumulate(case.objective, case.batch, case.row_to_unit)
    with pytest.raises(EngineStateError, match=r"^apply: step 2 begins another phase"):
        runner.apply(2)
    assert runner.training_mode == "FROZEN_DiT (step 1/1)"


def test_what_a_method_cannot_train_is_refused_before_the_first_step() -> None:
    case = Case("dit")
    case.model.final_layer.norm_final = nn.BatchNorm1d(16)
    case.model.parameter_groups = lambda: {  # type: ignore[assignment]
        "stem": ["x_embedder.proj.weight"],
        "norm": ["final_layer.norm_final.weight"],
    }
    phases = (Phase(groups=("stem",), end=9), Phase(groups=("norm",), start=10))
    with pytest.raises(UnsupportedModelError, match="norm_final"):
        case.runner(Schedule(phases=phases))


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("dit", "x2", r"^group of DiT: got 'x2'; accepted: adaln, all, attention, backbone, bias_norm, head$"),
        ("set film", "head", r"^group of SetDiT: got 'head'; accepted: .*encoder"),
        ("panda", "encoder_then_full(3)", r"^group of PandaDiT: got 'encoder'"),
    ],
)
def test_groups_that_a_model_has_not_are_refused(name: str, preset: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Case(name).runner(preset)


def test_other_mistakes_are_refused_in_a_line() -> None:
    case = Case("dit")
    with pytest.raises(UsageError, match=r"^group of DiT: got 'lora'.*give the schedule a lora_rank"):
        case.runner(Schedule(phases=(Phase(groups=("lora",)),)))
    with pytest.raises(UsageError, match=r"^model: got 'Linear'; accepted: a model with parameter_groups"):
        PhaseRunner(nn.Linear(2, 2), Schedule(), attach=attach, make_optimizer=OPTIMIZERS["sgd"])
    with pytest.raises(UsageError, match=r"^make_optimizer: got 'an optimizer of 1 groups'"):
        case.runner("full", make_optimizer=lambda parameters: OPTIMIZERS["sgd"](parameters[:2]))


def test_adapters_without_peft_are_refused_and_twice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(UsageError, match=r"^lora: peft cannot be imported .*pip install 'dit-dp\[lora\]'$"):
            Case("dit").runner("lora(2)")
    pytest.importorskip("peft")
    case = Case("dit")
    case.runner("lora(2)").engine.detach()
    with pytest.raises(UsageError, match=r"^lora: the model has low-rank adapters already"):
        case.runner("lora(2)")


def test_adapters_leave_the_function_as_it_was() -> None:
    pytest.importorskip("peft")
    case = Case("set variational")
    before = case.objective(case.model, case.batch)
    case.runner("lora(2)").engine.detach()
    assert torch.equal(case.objective(case.model, case.batch), before)
