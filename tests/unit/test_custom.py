"""A model of the user's own: its batch, its predictions, and one line for each mistake."""

from pathlib import Path

import pytest
import torch

from dit_dp.errors import UsageError
from memory_test.cli import main
from memory_test.core.custom import build_own, with_rows

HERE = "tests.own_models:"
MISTAKES = [
    ("condition", ["aten._local_scalar_dense", "a condition on a tensor", "in own_models.py, line "]),
    ("item", ["aten._local_scalar_dense", ".item()", "measure it with memory-test run"]),
    ("nonzero", ["aten.nonzero", "depend on data", "in own_models.py, line "]),
    ("in_backward", ["aten._local_scalar_dense", "in own_models.py, line "]),
    ("item_while_building", ["aten._local_scalar_dense", "in own_models.py, line "]),
    ("custom_operator", ["own_models::double", "no fake kernel", "register_fake"]),
    ("broken", ["broken() raised RuntimeError: no data"]),
    ("missing", ["got 'tests.own_models:missing'", "fixed, Made, "]),
    ("column", ["loss: got (3, 1)", "one loss per example, shape (3,)"]),
    ("mean_loss", ["loss: got ()", "one loss per example, shape (3,)"]),
    ("lists", ["dict of list", "a tuple or dict of tensors"]),
    ("ragged", ["one common first dimension"]),
    ("empty", ["0 rows", "at least 1"]),
    ("net", ["Sequential", "make_batch(num_examples)"]),
    ("Stingy", ["make_batch(3): 2 rows", "accepted: 3 rows"]),
    ("Unprepared", ["make_batch(3) raised KeyError: 'no such file'"]),
    ("frozen", ["no trainable parameter"]),
]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which is all that is said but for what is about to be done and what the user's code prints."""
    said = capsys.readouterr()
    assert said.out == ""
    others = ("said by the user's code", "predicted, nothing is run")
    (line,) = (line for line in said.err.splitlines() if not line.endswith(others))
    assert line.startswith("memory-test: error: ")
    return line


@pytest.mark.parametrize(
    ("name", "words", "method"),
    [(name, words, "vanilla") for name, words in MISTAKES]
    + [(name, words, method) for name, words in MISTAKES[:6] for method in ("ghost", "opacus")],
)
def test_a_prediction_says_in_one_line_what_it_cannot_do(
    name: str, words: list[str], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--experiment", method, "--model", HERE + name, "--batch-size", "3"]) == 2
    line = last_line(capsys)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "--model", "no_such_module:build"], "set PYTHONPATH to the folder that holds no_such_module"),
        (["predict", "--model", "a:b:c"], "accepted: module:callable"),
        (["predict", "--model", HERE + "fixed", "--depth", "3"], f"depth: got 3; accepted: no value; {HERE}fixed"),
        (["plan", "--model", HERE + "column", "--methods", "ghost"], "one loss per example"),
        (["plan", "--model", HERE + "nonzero", "--methods", "ghost"], "aten.nonzero"),
        (["plan", "--model", HERE + "fixed", "--image-size", "64"], "image_size: got 64; accepted: no value"),
    ],
    ids=str,
)
def test_mistakes_of_the_call(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = ["--experiment", "ghost"] if arguments[0] == "predict" else []
    assert main([*arguments, *experiment]) == 2
    assert words in last_line(capsys)


@pytest.mark.parametrize("name", ["fixed", "Made"])
@pytest.mark.parametrize("gpu", ["24GB", "cpu"])
def test_a_prediction(name: str, gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    call = ["predict", "--experiment", "bookkeeping", "--model", HERE + name, "--batch-size", "8", "--dtype", "bf16"]
    assert main([*call, "--gpu", gpu, "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("peak ")
    assert f"bookkeeping: {HERE}{name}, batch 8, bf16, on {gpu}" in said.err
    assert out.exists()


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "--model", HERE + "fixed", "--gpu", "24GB", "--batch-size", "64", "--methods", "ghost"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{HERE}fixed, float32, adamw, logical batch 64")
    assert f"memory-test run --experiment ghost --model {HERE}fixed --batch-size 64 --device cuda" in said


def test_a_plan_calls_what_one_method_cannot_do_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_convolution.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))\n"
        "    return model, lambda model, batch: model(*batch).square().mean(1), (torch.randn(4, 2, 6),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "--model", "own_convolution:build", "--batch-size", "8", "--methods", "ghost"]) == 2
    said = capsys.readouterr().out
    assert "ghost: refused: " in said
    assert "no rule for Conv1d" in said


def test_rows_are_cut_and_repeated() -> None:
    batch = {"x": torch.arange(3), "y": torch.arange(6).view(3, 2)}
    assert with_rows(batch, 3) is batch
    cut, more = with_rows(batch, 2), with_rows(batch, 7)
    assert cut["x"].tolist() == [0, 1]  # type: ignore[call-overload]
    assert cut["x"].untyped_storage().nbytes() == 16  # type: ignore[call-overload]
    assert more["x"].tolist() == [0, 1, 2, 0, 1, 2, 0]  # type: ignore[call-overload]
    assert more["y"][6].tolist() == [0, 1]  # type: ignore[call-overload]
    (alone,) = with_rows((torch.arange(2),), 1)
    assert alone.tolist() == [0]


def test_a_model_that_makes_batches_is_asked_for_as_many_rows() -> None:
    _, batch = build_own(HERE + "Made").case(7)
    assert [len(tensor) for tensor in batch] == [7, 7, 7]
    with pytest.raises(UsageError, match="2 rows"):
        build_own(HERE + "Stingy").case(7)
