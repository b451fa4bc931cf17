from dataclasses import replace

import pytest

from dit_dp.errors import UsageError
from memory_test.report import frames
from tests.factories import environment, grid, record, write_folder


def load(tmp_path, records):
    return frames.load_frame(write_folder(tmp_path / "records", records))


def test_one_row_per_record_in_registry_order(tmp_path):
    frame = load(tmp_path, grid())
    assert len(frame) == len(grid())
    assert list(dict.fromkeys(frame["experiment"]))[:3] == ["vanilla", "ghost", "opacus"]
    assert frame["peak_allocated_bytes"].dtype == "Int64"
    ghost = frame[(frame["experiment"] == "ghost") & (frame["batch_size"] == 4)].iloc[0]
    assert ghost["path"] == "ghost-b4.json"
    assert ghost["num_tokens"] == 256
    breakdown = [ghost[name] for name in frame.columns if name.startswith("breakdown_")]
    assert sum(breakdown) == ghost["peak_allocated_bytes"]
    assert ghost["step_time_min_s"] <= ghost["step_time_q1_s"] <= ghost["step_time_s"]
    assert ghost["phase_backward_time_s"] > 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"device_name": "NVIDIA A100"}, "device_name"),
        ({"torch_version": "2.12.0"}, "torch_version"),
        ({"commit": "f" * 40}, "commit"),
        ({"packages": {"opacus": "1.5.4", "diffusers": "0.42.1", "numpy": "2.4.6"}}, "packages.opacus"),
    ],
)
def test_two_environments_are_refused(tmp_path, change, name):
    records = [record("ghost"), record("vanilla"), record("opacus", env=environment(**change))]
    with pytest.raises(UsageError) as caught:
        load(tmp_path, records)
    message = str(caught.value)
    assert message.startswith(f"{name}: got ")
    assert "(2 records)" in message
    assert "one folder per machine" in message
    assert "\n" not in message


def test_the_device_is_named_before_what_else_differs(tmp_path):
    other = environment("cpu")
    with pytest.raises(UsageError, match=r"^device_name: .*H100.*EPYC.*also differ: device_type"):
        load(tmp_path, [record("ghost"), record("vanilla", device="cpu", env=other)])


def test_a_dirty_tree_alone_is_not_another_environment(tmp_path):
    assert len(load(tmp_path, [record("ghost"), record("vanilla", env=environment(dirty=True))])) == 2


def test_overheads_are_ratios_to_vanilla_of_the_same_group_and_batch(tmp_path):
    records = [record(m, b, dtype=d) for m in ("vanilla", "ghost") for b in (1, 4) for d in ("float32", "bf16")]
    records[0] = record("vanilla", 1, dtype="float32", scale=2.0)
    rows = frames.summarise(load(tmp_path, records))
    cell = rows[(rows["experiment"] == "ghost") & (rows["batch_size"] == 1) & (rows["dtype"] == "float32")].iloc[0]
    assert cell["time_ratio"] == pytest.approx(1.62 / 2)
    vanilla = rows[rows["experiment"] == "vanilla"]
    assert (vanilla["memory_ratio"] == 1).all()
    assert len(frames.groups(load(tmp_path, records))) == 2


def test_without_vanilla_the_ratio_is_empty(tmp_path):
    records = [record("ghost", 4), record("vanilla", 1), record("vanilla", 4, status="oom")]
    rows = frames.summarise(load(tmp_path, records))
    ghost = rows[rows["experiment"] == "ghost"].iloc[0]
    assert ghost[["memory_ratio", "time_ratio"]].isna().all()


def test_predictions_are_compared_with_predictions(tmp_path):
    records = [record("vanilla"), record("ghost"), record("ghost", source="predicted", scale=0.5)]
    rows = frames.summarise(load(tmp_path, records))
    predicted = rows[rows["source"] == "predicted"].iloc[0]
    assert predicted["label"] == "ghost (predicted)"
    assert predicted[["memory_ratio", "time_ratio"]].isna().all()


def test_a_cell_measured_twice_is_averaged(tmp_path):
    rows = frames.summarise(load(tmp_path, [record("ghost", scale=1.0), record("ghost", scale=3.0)]))
    assert len(rows) == 1
    assert rows["num_records"].iloc[0] == 2
    single = record("ghost").step_times_s
    assert min(single) < rows["step_time_s"].iloc[0] < 3 * max(single)


def test_an_average_over_differing_records_is_refused():
    base = record("ghost")
    for other, name in (
        (record("ghost", dtype="bf16"), "dtype"),
        (record("ghost", num_iter=10), "num_iter"),
        (record("ghost", env=environment(device_name="NVIDIA A100")), "device_name"),
        (replace(base, schema_version=base.schema_version + 1), "schema_version"),
        (record("ghost", source="predicted"), "source"),
    ):
        with pytest.raises(UsageError, match=f"^{name}: got .* accepted: one value within an average"):
            frames.average([base, other])
    assert frames.average([base, record("ghost", timeout_s=60.0)])["step_time_s"] > 0


def test_a_success_after_a_failure_counts(tmp_path):
    records = [record("ghost", status="timeout", timeout_s=1.0), record("ghost"), record("vanilla")]
    frame = load(tmp_path, records)
    rows = frames.summarise(frame)
    assert list(rows["status"]) == ["ok", "ok"]
    assert list(frames.failures(frame)["reason"]) == ["no result within 3600 s"]


def test_a_dead_worker_without_environment_stays_in_its_group(tmp_path):
    lost = replace(record("opacus", status="crashed"), environment=None)
    frame = load(tmp_path, [record("vanilla"), lost])
    assert frame["group"].nunique() == 1
    assert frame["device_name"].isna().sum() == 1


def test_a_cell_that_could_not_be_resolved_is_listed(tmp_path):
    lost = replace(record("opacus", status="error"), config_resolved={}, config_requested={"model": "DiT-XL/2"})
    frame = load(tmp_path / "a", [record("vanilla"), record("ghost"), lost])
    assert frame["batch_size"].tolist().count(1) == 1
    assert len(frames.groups(frame)) == 2


def test_only_costless_settings_share_a_group(tmp_path):
    records = [
        record("vanilla"),
        record("ghost", num_iter=5, noise_multiplier=2.0),
        record("ghost", optimizer="sgd"),
    ]
    frame = load(tmp_path, records)
    found = frames.groups(frame)
    assert [len(group.rows) for group in found] == [2, 1]
    assert "optimizer sgd" in found[1].title
    assert len({group.slug for group in found}) == 2


def test_headline_batch_is_where_most_methods_ran(tmp_path):
    assert frames.headline_batch(frames.summarise(load(tmp_path, grid()))) == 8
    lost = frames.summarise(load(tmp_path / "lost", [record("ghost", status="oom")]))
    assert frames.headline_batch(lost) is None


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds records"):
        frames.load_frame(tmp_path)


def test_models_of_the_users_own_stand_beside_named_ones(tmp_path):
    own = [record(m, batch, model="package.module:build") for m in ("vanilla", "ghost") for batch in (1, 4)]
    groups = frames.groups(load(tmp_path, [*own, record("ghost"), record("vanilla", model="DiT-S/2")]))
    assert [group.title for group in groups] == [
        "package.module:build · float32",
        "DiT-S/2 · 256 px, 4 channels, 256 tokens · float32",
        "DiT-XL/2 · 256 px, 4 channels, 256 tokens · float32",
    ]
    assert groups[0].slug == "package-module-build-float32"
    assert groups[0].rows["memory_ratio"].notna().all()
