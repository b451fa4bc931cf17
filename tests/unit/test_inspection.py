import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_dp.clipping import METHODS, attach
from dit_dp.errors import UsageError
from memory_test.inspection.args import InspectArgs
from memory_test.inspection.facts import Inspection, MethodVerdict, RuleUse
from memory_test.inspection.inspection import inspect_model, run_inspect
from memory_test.inspection.render import WIDTH, render_json, render_text
from memory_test.inspection.subject import Subject, build_subject
from tests.models import DIFFUSERS, KINDS, make_case

PRIVATE = [name for name, method in METHODS.items() if method.private]
TINY = {"depth": 2, "hidden_size": 32, "num_heads": 2, "image_size": 64, "num_classes": 10}
N = 4
TOKENS, IMAGES = torch.randn(N, 5, 6), torch.randn(N, 3, 8, 8)


class Calling(nn.Module):
    """Layers by name, and a function that calls them."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs).flatten(1)


class Positions(nn.Module):
    """A raw table, the usual reason for a refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def tied() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return Calling(lambda m, x: m.second(torch.tanh(m.first(x))), first=first, second=second)


def attended(m: Any, x: Tensor) -> Tensor:
    return m.mix(x, x, x, need_weights=False)[0]


ODD: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "unused": lambda: (Calling(lambda m, x: m.a(x), a=nn.Linear(6, 3), b=nn.Linear(6, 3)), (TOKENS,)),
    "discarded": lambda: (
        Calling(lambda m, x: (m.b(x), m.a(x))[1], a=nn.Linear(6, 3), b=nn.Linear(6, 3)),
        (TOKENS,),
    ),
    "weight read": lambda: (Calling(lambda m, x: F.linear(x, m.a.weight, m.a.bias), a=nn.Linear(6, 3)), (TOKENS,)),
    "flattened": lambda: (
        Calling(lambda m, x: m.b(m.a(x.flatten(0, 1)).view(N, 5, 3)), a=nn.Linear(6, 3), b=nn.Linear(3, 2)),
        (TOKENS,),
    ),
    "positions by embedding": lambda: (
        Calling(lambda m, x: m.b(x + m.a(torch.arange(5))), a=nn.Embedding(5, 6), b=nn.Linear(6, 2)),
        (TOKENS,),
    ),
    "raw parameter": lambda: (Calling(lambda m, x: m.b(m.a(x)), a=Positions(), b=nn.Linear(6, 2)), (TOKENS,)),
    "raw parameter of the root": lambda: (
        Calling(lambda m, x: m.a(x) + m.p, a=nn.Linear(6, 2), p=nn.Parameter(torch.zeros(2))),
        (TOKENS,),
    ),
    "attention of torch": lambda: (Calling(attended, mix=nn.MultiheadAttention(6, 2, batch_first=True)), (TOKENS,)),
    "recurrent": lambda: (Calling(lambda m, x: m.a(x)[0], a=nn.LSTM(6, 2, batch_first=True)), (TOKENS,)),
    "batch norm": lambda: (
        Calling(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 2), b=nn.BatchNorm2d(4)),
        (IMAGES,),
    ),
    "instance norm": lambda: (
        Calling(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 2), b=nn.InstanceNorm2d(4, affine=True)),
        (IMAGES,),
    ),
    "conv1d": lambda: (Calling(lambda m, x: m.a(x), a=nn.Conv1d(5, 4, 2)), (TOKENS,)),
    "one label each": lambda: (
        Calling(lambda m, y: m.b(m.a(y)), a=nn.Embedding(5, 4), b=nn.Linear(4, 2)),
        (torch.arange(N),),
    ),
    "by keyword": lambda: (Calling(lambda m, x: m.a(input=x), a=nn.Linear(6, 3)), (TOKENS,)),
    "tied": lambda: (tied(), (TOKENS,)),
}


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch).square().mean(1)


def examine(model: nn.Module, inputs: tuple[Tensor, ...] | None) -> Inspection:
    return inspect_model(Subject("it", model, inputs))


def verdict(inspection: Inspection, method: str) -> MethodVerdict:
    return next(item for item in inspection.methods if item.method == method)


def use_of(inspection: Inspection, method: str, layer: str) -> RuleUse:
    return next(use for use in verdict(inspection, method).rules if layer in use.layers)


def counts(inspection: Inspection, method: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for use in verdict(inspection, method).rules:
        found[use.rule] = found.get(use.rule, 0) + len(use.layers)
    return found


def runs(method: str, model: nn.Module, loss_fn: Any, batch: Any) -> bool:
    """Try it."""
    try:
        engine = attach(model, method, 1.0)
    except UsageError:
        return False
    try:
        engine.accumulate(loss_fn, batch)
    except Exception:  # noqa: BLE001 - Opacus fails in many ways
        return False
    finally:
        engine.detach()
    return True


@pytest.fixture(scope="module")
def tiny() -> Inspection:
    return inspect_model(build_subject(InspectArgs(**TINY)))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of the user's own and return its name."""

    def write(body: str) -> str:
        name = f"users_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


# --- verdicts against what happens --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_verdict_is_what_happens(kind: str, method: str) -> None:
    case = make_case(kind)
    assert isinstance(case.batch, tuple)
    inputs = case.batch[:-1]
    found = verdict(examine(case.model, inputs), method)
    assert found.supported == runs(method, make_case(kind).model, case.loss_fn, case.batch), found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ODD)
def test_verdict_is_what_happens_to_odd_models(kind: str, method: str) -> None:
    if (kind, method) == ("flattened", "microbatch"):
        return  # the loss decides, not the model: this one has a row a token
    found = verdict(examine(*ODD[kind]()), method)
    model, batch = ODD[kind]()
    assert found.supported == runs(method, model, loss_of, batch), found
    assert all(use.fix for use in found.rules if use.rule == "none")


@pytest.mark.parametrize("method", ["ghost", "bookkeeping", "flash_clip", "flash_clip_bk"])
@pytest.mark.parametrize("kind", KINDS)
def test_rules_at_a_shape_are_the_engines(kind: str, method: str) -> None:
    case, same = make_case(kind), make_case(kind)
    assert isinstance(case.batch, tuple)
    found = {
        layer: use.rule for use in verdict(examine(case.model, case.batch[:-1]), method).rules for layer in use.layers
    }
    engine: Any = attach(same.model, method, 1.0)
    engine.accumulate(same.loss_fn, same.batch)
    used = {name.rpartition(".")[0] or "(root)": rule for name, rule in engine._rules_used.items()}
    used = {layer: rule for layer, rule in used.items() if found[layer] != "broadcast"}  # raw matrices: by use
    assert {layer: found[layer] for layer in used} == used


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {}])
@pytest.mark.parametrize("method", PRIVATE)
def test_every_private_method_refuses_batch_norm(method: str, options: dict[str, bool]) -> None:
    model = Calling(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 8, 2), b=nn.BatchNorm2d(8, **options))
    use = use_of(examine(model, (IMAGES,)), method, "b")
    assert (use.rule, use.fix) == ("none", "GroupNorm(8, 8)")


def test_tokens_flattened_into_the_batch_are_refused_where_opacus_clips_them_one_by_one() -> None:
    model = Calling(lambda m, x: m.a(x.flatten(0, 1)).view(N, -1), a=nn.Linear(6, 3))
    inspection = examine(model, (TOKENS,))
    # microbatch sees one example at a time, so whatever a layer does with its tokens, they are one example's
    assert [method for method in PRIVATE if verdict(inspection, method).supported] == ["microbatch"]
    assert "20 rows for 4 examples" in use_of(inspection, "opacus", "a").reason


# --- what is reported ---------------------------------------------------------------------------------------------


def test_dit_xl_counts_without_memory() -> None:
    subject = build_subject(InspectArgs())
    assert {p.device.type for p in subject.model.parameters()} == {"meta"}
    inspection = inspect_model(subject)
    assert inspection.total_parameters == 675_129_632
    assert inspection.trainable_parameters == 674_834_720
    assert inspection.parameter_bytes_float32 == 4 * 675_129_632
    assert inspection.frozen == ("pos_embed",)
    assert inspection.sizes is not None
    assert inspection.sizes.num_tokens == 256
    assert all(item.supported for item in inspection.methods)
    assert counts(inspection, "ghost") == {"ghost": 112, "outer product": 31, "direct": 2, "embedding": 1}
    assert sum(kind.parameters for kind in inspection.layer_types) == 674_834_720


def test_shapes_of_a_dit(tiny: Inspection) -> None:
    by_name = {facts.name: facts for facts in tiny.modules}
    (call,) = by_name["blocks.1.attn.qkv"].calls
    assert (call.inputs, call.outputs) == (((2, 16, 32),), ((2, 16, 96),))
    assert by_name["blocks"].calls == ()
    assert tiny.validator_errors == ()
    assert verdict(tiny, "vanilla").rules == ()


def test_text_is_narrow_and_collapses_blocks(tiny: Inspection) -> None:
    text = render_text(tiny)
    assert text.startswith("DiT-XL/2 (width 32, depth 2, heads 2)\n")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "blocks.0-1 ×2" in text
    assert "N×16×32 → N×16×96" in text
    assert "Opacus ModuleValidator: no errors" in text
    assert "Fixes" not in text


def test_text_is_cut_at_max_depth(tiny: Inspection) -> None:
    text = render_text(tiny, max_depth=1)
    assert "qkv" not in text
    block = sum(facts.num_parameters for facts in tiny.modules if facts.name.startswith("blocks.0."))
    assert f"+ {block:,} in 12 below" in text


def test_json_agrees_with_text(tiny: Inspection) -> None:
    document = json.loads(render_json(tiny))
    text = render_text(tiny)
    assert document["schema_version"] == 1
    assert f"{document['total_parameters']:,}" in text
    assert sum(m["num_parameters"] for m in document["modules"]) == document["total_parameters"]
    for method in document["methods"]:
        assert method["supported"] is True
        for rule in method["rules"]:
            assert f"{rule['type']} ×{len(rule['layers'])}" in text


def test_model_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.DiTTransformer2DModel(**{**DIFFUSERS, "num_layers": 3}).save_pretrained(tmp_path)
    args = InspectArgs(model=str(tmp_path), pretrained=True, image_size=64, num_classes=10)
    inspection = inspect_model(build_subject(args))
    assert inspection.shapes_unknown is None
    assert verdict(inspection, "ghost").supported
    assert not verdict(inspection, "opacus-ghost").supported
    embedder = "model.transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
    assert "called 2 times" in use_of(inspection, "opacus-ghost", embedder).reason
    assert use_of(inspection, "ghost", embedder).rule == "ghost"  # two calls are two positions
    assert use_of(inspection, "ghost", embedder.replace("blocks.0", "blocks.1")).rule == "outer product"
    table = "model.transformer_blocks.1.norm1.emb.class_embedder.embedding_table"
    assert "(N,)" in use_of(inspection, "opacus-ew", table).reason
    assert "transformer_blocks.1-2 ×2" in render_text(inspection)


# --- models of the user's own -------------------------------------------------------------------------------------


def test_fixes_of_a_users_model(module: Callable[[str], str]) -> None:
    name = module(
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)\n"
        "    def forward(self, x):\n"
        "        print('not for stdout')\n"
        "        return self.bn(self.conv(x))\n"
        "def make():\n"
        "    return Net(), {'x': torch.randn(2, 3, 8, 8)}"
    )
    out = io.StringIO()
    assert run_inspect(InspectArgs(model=f"{name}:make"), out) == 0
    assert "bn: GroupNorm(16, 16)" in out.getvalue()
    assert "Opacus ModuleValidator: 1 error" in out.getvalue()
    assert "not supported: 1 layer" in out.getvalue()


def test_json_is_all_there_is_on_stdout(module: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    name = module("def make():\n    print('building')\n    return nn.Linear(3, 2), (torch.randn(2, 3),)")
    assert run_inspect(InspectArgs(model=f"{name}:make", json=True)) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 8


@pytest.mark.parametrize("body", ["def make():\n    return nn.Linear(3, 2)", "make = nn.Linear(3, 2)"])
def test_without_inputs_shapes_are_unknown(module: Callable[[str], str], body: str) -> None:
    inspection = inspect_model(build_subject(InspectArgs(model=f"{module(body)}:make")))
    assert inspection.shapes_unknown == "the callable returned no inputs"
    assert counts(inspection, "ghost") == {"by shape": 1}
    assert "unknown: the callable returned no inputs" in render_text(inspection)


def test_ties_are_seen_without_shapes() -> None:
    inspection = examine(tied(), None)
    assert verdict(inspection, "opacus").supported
    assert "shares a parameter with second" in use_of(inspection, "opacus-ghost", "first").reason


def test_a_forward_that_raises_leaves_shapes_unknown() -> None:
    inspection = examine(nn.Linear(3, 2), (torch.zeros(2, 4),))
    assert inspection.shapes_unknown is not None
    assert inspection.shapes_unknown.startswith("the forward pass raised RuntimeError: ")


def test_model_without_trainable_parameters() -> None:
    inspection = examine(nn.Linear(3, 2).requires_grad_(False), (torch.zeros(2, 3),))
    assert not any(item.supported for item in inspection.methods)
    assert "no trainable parameter" in (inspection.methods[0].refusal or "")
    assert render_text(inspection)


def test_evaluation_mode_is_reported() -> None:
    inspection = examine(nn.Linear(3, 2).eval(), (torch.zeros(2, 3),))
    assert [error.fix for error in inspection.validator_errors] == ["call model.train()"]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Linear(3, 2)
    before = set(vars(model))
    examine(model, (torch.zeros(2, 3),))
    assert set(vars(model)) == before
    assert not model._forward_hooks
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "attribute", "message"),
    [
        ("def make():\n    raise KeyError('no\\n weights')", "make", "make() raised KeyError"),
        ("def make():\n    return 3", "make", "returned int; accepted: an nn.Module"),
        ("def make():\n    return nn.Linear(1, 1), 3", "make", "returned inputs as int"),
        ("def make():\n    return 3", "made", "accepted: make"),
        ("make = 3", "make", "a callable that returns an nn.Module"),
        ("raise OSError('gone')", "make", "raised OSError: gone"),
        ("raise SystemExit(1)", "make", "raised SystemExit: 1"),
        ("import not_there_at_all", "make", "No module named 'not_there_at_all'"),
    ],
)
def test_mistakes_are_one_line(module: Callable[[str], str], body: str, attribute: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build_subject(InspectArgs(model=f"{module(body)}:{attribute}"))
    assert message in str(raised.value)
    assert str(raised.value).startswith("model: ")
    assert "\n" not in str(raised.value)
    assert "PYTHONPATH" not in str(raised.value)


def test_missing_module_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="PYTHONPATH to the folder that holds nowhere_to_be_found"):
        build_subject(InspectArgs(model="nowhere_to_be_found.models:make"))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"model": "DiT-Q/2"}, "model"),
        ({"model": "a b:make"}, "model"),
        ({"model": "a:"}, "model"),
        ({"model": "a:make", "depth": 2}, "depth"),
        ({"model": "folder", "pretrained": True, "depth": 2}, "depth"),
        ({"image_size": 100}, "image_size"),
        ({"in_channels": 5}, "in_channels"),
        ({"max_depth": -1}, "max_depth"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size"),
    ],
)
def test_arguments_are_checked_before_anything_is_built(options: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=f"^{field}: "):
        InspectArgs(**options)
