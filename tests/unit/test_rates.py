"""Step time: counted operations over rates, calibration files, and what they are refused for."""

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.predict import calibrate
from memory_test.predict import rates as files
from memory_test.predict.args import CalibrateArgs
from memory_test.predict.cards import CARDS
from memory_test.predict.flops import count_bytes
from memory_test.predict.predict import Imagined, imagined_run
from memory_test.predict.rates import Calibration, Cell
from memory_test.predict.replay import Place
from memory_test.predict.roofline import Rates, kernel_class, operation_seconds, phase_seconds, rates_of, step_seconds
from memory_test.predict.trace import Operation, Trace

RATES = Rates(100.0, 200.0, 50.0, 80.0, 10.0)


def test_the_names_in_a_file_are_those_of_the_rates() -> None:
    assert {*files.RATES, "calibrated"} == set(vars(RATES))


@pytest.mark.parametrize(
    ("name", "flops", "num_bytes", "dtype", "seconds"),
    [
        ("mm", 1000, 10, torch.float32, 10.0),
        ("mm", 1000, 10, torch.bfloat16, 5.0),
        ("convolution_backward", 1000, 10, torch.float32, 10.0),
        ("dit_dp::norm_partials", 1000, 10, torch.bfloat16, 5.0),
        ("_scaled_dot_product_flash_attention", 1000, 10, torch.bfloat16, 12.5),
        ("_scaled_dot_product_efficient_attention_backward", 1000, 10, torch.float32, 20.0),
        ("add", 0, 1000, torch.float32, 100.0),
        ("mm", 1, 1000, torch.float32, 100.0),
    ],
)
def test_an_operation_takes_what_it_meets_first(
    name: str, flops: int, num_bytes: int, dtype: torch.dtype, seconds: float
) -> None:
    assert operation_seconds(Operation(name, flops, num_bytes, dtype), RATES) == seconds
    assert kernel_class(name) in ("product", "attention", "other")


def test_a_phase_takes_the_devices_time_or_the_hosts_and_counts_what_is_alike() -> None:
    operations = [Operation("mm", 100, 0, torch.float32, count=3), Operation("add", 0, 10, torch.float32)]
    trace = Trace(storages=[], events=[0, 0, 1, 1], operations=operations, event_operations=[0, 1, 1, 2])
    places = (Place(0, 2, "input"), Place(1, 2, "forward", 1), Place(3, 2, "backward", 2), Place(3, 2, "idle", 2))
    assert phase_seconds(trace, places, RATES) == {"input": 3.0, "forward": 1.0, "backward": 0.0}
    slow = Rates(100.0, 200.0, 50.0, 80.0, 10.0, launch_s=2.0)
    assert phase_seconds(trace, places, slow)["input"] == 6.0
    assert step_seconds(trace, places, RATES) == 1.0, "drawing the input is no part of a step"


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[Imagined, Counter[str]]]:
    """Return a step of two physical batches by method, and the FLOPs of its phases."""
    found = {}
    for method in ("vanilla", "bookkeeping"):
        sizes: dict[str, Any] = {"depth": 1, "hidden_size": 1152, "num_heads": 16, "batch_size": 8, "accumulation": 2}
        config = ExperimentConfig(experiment=method, device="cuda", **sizes)
        run = imagined_run(config.resolve(device="cuda", num_threads=1), CARDS["H100-80GB"], 2, whole=False)
        flops: Counter[str] = Counter()
        for place, following in pairwise(run.places):
            if place.step == run.places[-1].step:
                inside = run.trace.operations[place.operations : following.operations]
                flops[place.phase] += sum(operation.count * operation.flops for operation in inside)
        found[method] = (run, flops)
    return found


def test_sums_added_in_place_count_as_products(counted: dict[str, tuple[Imagined, Counter[str]]]) -> None:
    """Forward and gradients of inputs are the same; what is left of a step is the gradients of weights."""
    (_, plain), (run, private) = counted["vanilla"], counted["bookkeeping"]
    assert any(operation.name == "addmm_" for operation in run.trace.operations)
    assert private["forward"] == plain["forward"]
    assert 0.9 * plain["forward"] < private["clip"] < 1.1 * plain["forward"]
    assert private["backward"] + private["clip"] > plain["backward"]


def test_the_optimizers_step_moves_what_adamw_reads_and_writes(
    counted: dict[str, tuple[Imagined, Counter[str]]],
) -> None:
    """foreach: parameters, gradients, moments and a denominator in seven passes; the last step's are counted too."""
    run, _ = counted["vanilla"]
    place = run.places[-2]
    assert place.phase == "optimizer"
    moved = sum(o.num_bytes for o in run.trace.operations[place.operations : run.places[-1].operations])
    size = 4 * run.choices["num_trainable_parameters"]
    assert 15 * size < moved < 25 * size


@pytest.mark.parametrize("name", ["empty_like", "_unsafe_view", "squeeze_"])
def test_what_runs_no_kernel_takes_no_time(name: str) -> None:
    assert count_bytes(None, name, (), {}, [torch.ones(3)], [torch.ones(3)]) == 0
    trace = Trace(operations=[Operation(name, 0, 0, torch.float32)])
    slow = dataclasses.replace(RATES, launch_s=2.0)
    assert phase_seconds(trace, (Place(0, 1, "forward"), Place(0, 1, "idle", 1)), slow) == {"forward": 0.0}


def a_calibration(**changes: Any) -> Calibration:
    values = {**{name: value for name, value in vars(RATES).items() if name != "calibrated"}, "launch_s": 1e-6}
    cell = Cell(experiment="ghost", batch_size=4, dtype="float32", predicted_s=1.1, measured_s=1.0)
    facts: dict[str, Any] = {"card": "H100-80GB", "rates": values, "cells": [cell], "environment": {}}
    return Calibration(**{**facts, **changes})


def test_a_calibration_is_read_as_it_was_written_and_gives_the_rates(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(files.dump(a_calibration()))
    assert files.load(path) == a_calibration()
    assert files.load(path).worst_error == pytest.approx(0.1)
    found = rates_of(CARDS["H100-80GB"], path)
    assert found.calibrated
    assert found.product_half == RATES.product_half


def test_a_calibration_of_another_device_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(files.dump(a_calibration()))
    for card in (CARDS["A100-80GB"], None):
        with pytest.raises(UsageError, match=r"^calibration: got '.*c.json of H100-80GB'; accepted: one of "):
            rates_of(card, path)


def test_a_newer_or_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UsageError, match=r"^schema_version: got 99"):
        files.load(path)
    path.write_text("{")
    with pytest.raises(UsageError, match=r"^calibration: got "):
        files.load(path)


def test_without_a_file_rates_are_the_vendors() -> None:
    card = CARDS["A100-40GB"]
    found = rates_of(card)
    assert not found.calibrated
    assert (found.product_half, found.bandwidth) == (card.bf16, card.bandwidth)


def test_a_shipped_file_is_taken_for_its_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    (tmp_path / "H100-80GB.json").write_text(files.dump(a_calibration()))
    assert rates_of(CARDS["H100-80GB"]).calibrated
    assert not rates_of(CARDS["A100-80GB"]).calibrated
    (tmp_path / "A100-80GB.json").write_text(files.dump(a_calibration()))
    with pytest.raises(AssertionError, match="is of H100-80GB"):
        rates_of(CARDS["A100-80GB"])


@pytest.mark.parametrize("rates", [{}, {"bandwidth": 0.0}, {"speed": 1.0}], ids=str)
def test_a_file_without_its_rates_is_refused(tmp_path: Path, rates: dict[str, float]) -> None:
    path = tmp_path / "c.json"
    known = a_calibration().rates if rates else {}
    path.write_text(files.dump(a_calibration(rates={**known, **rates})))
    with pytest.raises(UsageError, match=r"^calibration: got '.*c.json: \w+=") as raised:
        files.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "start"),
    [({"card": "H1000"}, "card: got 'H1000'"), ({"seconds": 0.0}, "seconds: got 0.0")],
)
def test_mistakes_are_refused(tmp_path: Path, changes: dict[str, Any], start: str) -> None:
    with pytest.raises(UsageError) as raised:
        CalibrateArgs(output=tmp_path / "c.json", **changes)
    assert str(raised.value).startswith(start)


def test_a_calibration_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def tried(config: Any, *given: Any) -> Cell:
        measured.append(config.experiment)
        if measured == ["vanilla", "vanilla", "bookkeeping"]:
            raise UsageError("stopped")
        size = config.batch_size
        return Cell(experiment=config.experiment, batch_size=size, dtype="float32", predicted_s=1.0, measured_s=2.0)

    timed: list[float] = []

    def rated(device: str, seconds: float) -> Rates:
        timed.append(seconds)
        return dataclasses.replace(RATES, launch_s=1e-6)

    monkeypatch.setattr(calibrate, "measure_rates", rated)
    monkeypatch.setattr(calibrate, "_try", tried)
    args = CalibrateArgs(output=tmp_path / "c.json", device="cpu")
    with pytest.raises(UsageError, match="stopped"):
        calibrate.run_calibrate(args)
    assert len(files.load(calibrate.unfinished(args.output)).cells) == 2
    assert not args.output.exists()
    assert calibrate.run_calibrate(args) == 0
    assert timed == [0.5], "rates are taken once"
    assert measured[3:] == ["bookkeeping", "bookkeeping", "ghost", "ghost"]
    assert [cell.experiment for cell in files.load(args.output).cells] == [*measured[:2], *measured[3:]]
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
