"""One rank among several, imagined: what it holds, what is left behind, what is refused."""

from typing import Any

import pytest
import torch.distributed as dist

from dit_dp.clipping import METHODS
from dit_dp.errors import UsageError
from memory_test import cli
from memory_test.core.config import ExperimentConfig
from memory_test.core.units import MIB
from memory_test.predict import predict
from memory_test.predict.args import PredictArgs
from memory_test.predict.cards import CARDS
from memory_test.predict.predict import Imagined, imagined_run, predict_memory

H100 = CARDS["H100-80GB"]
SMALL: dict[str, Any] = {"model": "DiT-S/2", "depth": 2, "hidden_size": 64, "num_heads": 2, "image_size": 64}
BLOCK = 4 * (64 * 64 * (3 + 1 + 4 + 4 + 6) + 64 * (3 + 1 + 4 + 1 + 6))
"""Bytes of a block's parameters: attention, MLP, adaLN."""


def run_of(world_size: int, sharding: str, experiment: str) -> Imagined:
    config = ExperimentConfig(experiment=experiment, batch_size=2, **SMALL)
    ranks = {"world_size": world_size, "sharding": sharding} if world_size > 1 else {}
    return imagined_run(config.resolve(device="cuda", num_threads=1) | ranks, H100)


def test_a_rank_of_fsdp2_holds_its_shards_and_gathers_blocks() -> None:
    found = {size: run_of(size, "fsdp2", "ghost_fsdp_bk") for size in (2, 4)}
    for size, run in found.items():
        assert not dist.is_initialized()
        breakdown = predict_memory(run, H100).repeat.breakdown_bytes
        state = 8 * run.choices["num_trainable_parameters"] / size
        assert state <= breakdown["optimizer_state"] <= state + 200 * 512
        sizes = [storage.num_bytes for storage in run.trace.storages]
        assert sizes.count(BLOCK) >= 2 * 2 * 3  # all-gathered: two blocks, forward and backward, three steps
        weight = 4 * 6 * 64 * 64
        assert sizes.count(weight) >= 2 * 3 * 2  # the sum and the noise of adaLN at full shape
        assert sizes.count(weight // size) >= 2 * 3 * 2  # and their shards


def test_replicas_hold_ddps_buckets_on_top_of_one_rank() -> None:
    one, two = run_of(1, "none", "bookkeeping"), run_of(8, "ddp", "bookkeeping")
    peaks = [predict_memory(run, H100).repeat.peak_allocated_bytes for run in (one, two)]
    buckets = 4 * one.choices["num_trainable_parameters"]
    assert peaks[0] is not None
    assert peaks[1] is not None
    assert abs(peaks[1] - peaks[0] - buckets) < 0.01 * MIB
    assert one.choices == two.choices


@pytest.mark.parametrize("method", [name for name, facts in METHODS.items() if not facts.peer and name != "microbatch"])
def test_every_method_of_ours_is_predicted_as_a_replica_and_those_that_can_as_shards(method: str) -> None:
    for sharding in ("ddp", "fsdp2") if METHODS[method].sharded else ("ddp",):
        found = predict_memory(run_of(2, sharding, method), H100).repeat
        assert found.peak_allocated_bytes
        assert found.breakdown_bytes["unattributed"] == 0


def test_the_group_is_gone_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (dist.all_gather_object, dist.broadcast_object_list)

    def broken(*args: Any, **kwargs: Any) -> None:
        assert dist.get_world_size() == 4
        raise ZeroDivisionError

    monkeypatch.setattr(predict, "run_loop", broken)
    with pytest.raises(ZeroDivisionError):
        run_of(4, "fsdp2", "ghost")
    assert not dist.is_initialized()
    assert (dist.all_gather_object, dist.broadcast_object_list) == before


def test_a_process_in_a_group_of_its_own_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match=r"^world_size: this process is in a process group already"):
            run_of(2, "ddp", "ghost")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_the_text_and_the_record_say_what_is_covered(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_test.core import store

    monkeypatch.chdir(tmp_path)
    sizes = "--model DiT-S/2 --depth 1 --hidden-size 64 --num-heads 2 --image-size 64 --batch-size 3"
    ranks = "--world-size 8 --sharding fsdp2"
    call = f"--experiment ghost_fsdp_bk {sizes} {ranks} --output r.json"
    assert cli.main_predict(call.split()) == 0
    text = capsys.readouterr().out
    assert "rank 0 of 8, fsdp2, each with a batch of 3" in text
    assert "reserved (error unknown)" in text
    record = store.load(tmp_path / "r.json")
    assert record.config_resolved is not None
    assert (record.config_resolved["world_size"], record.config_resolved["sharding"]) == (8, "fsdp2")
    for name in ("ranks_covered", "ranks_not_covered"):
        assert record.choices[name] in text
    assert "never compared with several GPUs" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ghost --world-size 0", "world_size: got 0; accepted: an integer from 1 to 1024"),
        ("ghost --world-size 1025 --sharding ddp", "world_size: got 1025; accepted: an integer from 1 to 1024"),
        ("ghost --world-size 2", "sharding: got 'none'; accepted: ddp, fsdp2; "),
        ("ghost --sharding ddp", "world_size: got 1; accepted: an integer >= 2; --sharding ddp"),
        ("vanilla --world-size 2 --sharding fsdp2", "experiment: got 'vanilla'; accepted: ghost, "),
        ("opacus --world-size 2 --sharding ddp", "experiment: got 'opacus'; accepted: vanilla, "),
        ("ghost --world-size 2 --sharding tensor", "--sharding"),
        ("ghost --world_size two", "two"),
    ],
)
def test_ranks_that_make_no_sense_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        raise SystemExit(cli.main_predict(["--experiment", *arguments.split()]))
    assert raised.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("memory-test predict: error: ") or lines[0].startswith("memory-test: error: ")
    assert words in lines[0]


def test_arguments_made_by_hand_are_checked_too() -> None:
    config = ExperimentConfig(experiment="ghost", **SMALL)
    with pytest.raises(UsageError, match=r"^sharding: got 'tensor'; accepted: none, ddp, fsdp2"):
        PredictArgs(config=config, world_size=2, sharding="tensor")  # type: ignore[arg-type]
    assert PredictArgs(config=config).ranks == {}
