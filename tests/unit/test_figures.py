import colorsys
import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib as mpl
import pytest

from memory_test.core.schema import BREAKDOWN, Timeline
from memory_test.report import figures, frames, palette
from memory_test.report.panels import spread_out, thin
from memory_test.report.plates import plates, ranges
from tests.factories import METHODS, grid, record, write_folder


def group_of(tmp_path, records):
    return frames.groups(frames.load_frame(write_folder(tmp_path / "records", records)))[0]


def texts(figure):
    return " | ".join(re.findall(r"<text[^>]*>([^<]*)<", palette.to_svg(figure, "t", "d")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return group_of(tmp_path_factory.mktemp("grid"), grid()).rows


def test_every_category_and_method_has_its_colour():
    assert list(palette.CATEGORY_COLORS) == list(BREAKDOWN) == list(palette.CATEGORY_NAMES)
    assert len(set(palette.CATEGORY_COLORS.values())) == len(BREAKDOWN)
    assert len({palette.method_color(name) for name in METHODS}) == len(METHODS)
    assert len({palette.method_marker(name) for name in METHODS}) == len(METHODS)
    assert palette.method_color("new-method") == palette.method_color("new-method")


def test_neighbouring_categories_differ_in_lightness():
    values = list(palette.CATEGORY_COLORS.values())[:-1]
    lightness = [colorsys.rgb_to_hls(*mpl.colors.to_rgb(value))[1] for value in values]
    assert all(abs(a - b) > 0.03 for a, b in itertools.pairwise(lightness))


def test_peaks_are_labelled_and_failures_named(rows):
    shown = texts(figures.peak_by_method(rows, 16))
    assert "45.78 GiB" in shown
    assert "out of memory" in shown
    assert "timed out" in shown


def test_stacks_end_at_the_peak(rows):
    axes = figures.peak_by_method(rows, 8).axes[0]
    ends = {}
    for bar in axes.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        ends[place] = max(ends.get(place, 0), bar.get_x() + bar.get_width())
    peaks = rows[rows["batch_size"] == 8]["peak_allocated_bytes"]
    assert list(ends.values()) == pytest.approx([peak / 2**30 for peak in peaks])


def test_overhead_says_when_there_is_nothing_to_compare_with(rows, tmp_path):
    assert "1.07× memory" in texts(figures.overhead(rows, 8))
    alone = group_of(tmp_path, [record("ghost")]).rows
    assert "no vanilla to compare with" in texts(figures.overhead(alone, 4))


def test_the_out_of_memory_edge_is_marked(rows):
    axes = figures.memory_against_batch(rows).axes[0]
    assert sum(text.get_text() == "×" for text in axes.texts) == len(METHODS)
    assert "limit 79.19 GiB" in texts(figures.memory_against_batch(rows))


def test_predictions_are_never_drawn_as_measured(tmp_path):
    records = [record(m, b, source=s) for m in ("vanilla", "ghost") for b in (1, 4) for s in ("measured", "predicted")]
    rows = group_of(tmp_path, records).rows
    for figure in (figures.peak_by_method(rows, 4), figures.throughput(rows, 4), figures.overhead(rows, 4)):
        assert any(bar.get_hatch() == "////" for bar in figure.axes[0].patches)
        assert "(predicted)" in texts(figure)
    for figure in (figures.memory_against_batch(rows), figures.pareto(rows)):
        assert any(line.get_linestyle() == "--" for line in figure.axes[0].lines)
        assert "ghost (predicted)" in texts(figure)
    assert "ghost (predicted)" in texts(figures.phase_timeline(record("ghost", source="predicted")))


def test_the_front_holds_private_cells_that_nothing_beats(rows):
    good = rows[rows["status"] == "ok"]
    points = good.assign(x=good["peak_allocated_bytes"].astype(float), y=good["step_time_s"] / good["batch_size"])
    front = figures.pareto_front(points)
    private = points[points["experiment"] != "vanilla"]
    assert "vanilla" not in set(front["experiment"])
    assert front["y"].is_monotonic_decreasing
    for cell in front.itertuples():
        assert not ((private["x"] < cell.x) & (private["y"] < cell.y)).any()


def test_timelines_name_their_phases_and_share_an_axis():
    figure = figures.phase_timeline(record("ghost"), limit_bytes=2**40)
    shown = texts(figure)
    assert all(name in shown for name in ("forward", "backward", "clip", "noise", "optimizer"))
    assert figure.axes[0].get_ylim()[1] > 1024


def test_svg_is_valid_deterministic_and_carries_its_source(rows):
    first = palette.to_svg(figures.peak_by_method(rows, 8), "Peak <1>", "Records: a&b.json")
    assert first == palette.to_svg(figures.peak_by_method(rows, 8), "Peak <1>", "Records: a&b.json")
    root = ET.fromstring(first)
    assert "Records: a&b.json" in "".join(root.itertext())
    assert "prefers-color-scheme: dark" in first
    assert "<text" in first


def test_inlined_figures_share_no_id(rows):
    svg = palette.to_svg(figures.pareto(rows), "t", "d")
    both = palette.inline_svg(svg, "a-") + palette.inline_svg(svg, "b-")
    ids = re.findall(r'\bid="([^"]*)"', both)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", both)) | set(re.findall(r'href="#([^"]*)"', both))
    assert used <= set(ids)
    assert not re.search(r'<svg[^>]* (width|height)="', both)


def test_png_is_opaque(rows):
    data = palette.to_png(figures.throughput(rows, 8), "t", "d")
    assert data.startswith(b"\x89PNG")
    assert b"Description" in data


def test_global_settings_stay_as_they_were(rows):
    before = dict(mpl.rcParams)
    palette.to_svg(figures.throughput(rows, 8), "t", "d")
    assert dict(mpl.rcParams) == before


def test_every_plate_names_its_records(tmp_path):
    for device in ("cuda", "cpu"):
        for plate in plates(group_of(tmp_path / device, grid(device))):
            assert plate.numbers
            assert plate.caption
    assert plates(group_of(tmp_path, [record("ghost", status="oom")])) == []


def test_records_without_timing_breakdown_or_timeline_still_draw(tmp_path):
    bare = {"step_times_s": [], "throughput_examples_per_s": None, "breakdown_bytes": {}, "timeline": None}
    group = group_of(tmp_path, [replace(record(m), phases={}, **bare) for m in ("vanilla", "ghost")])
    assert [plate.title for plate in plates(group)] == [
        "Peak memory, batch 4",
        "Overhead over vanilla, batch 4",
    ]


def test_labels_move_apart_and_stay_inside():
    placed = spread_out([0.5, 0.5, 0.51, 1.4, -0.2 + 1.2], 0.1)
    assert all(b - a > 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert min(placed) >= 0
    assert max(placed) <= 1
    assert spread_out([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])
    assert spread_out([], 0.1) == []


def test_long_timelines_are_thinned_to_their_extremes():
    times = [float(index) for index in range(20_000)]
    sizes = [float(index % 7) for index in range(20_000)]
    sizes[12_345] = 99.0
    kept_times, kept_sizes = thin(times, sizes)
    assert len(kept_times) <= 610
    assert kept_times == sorted(kept_times)
    assert max(kept_sizes) == 99.0
    assert thin([0.0, 1.0], [1.0, 2.0]) == ([0.0, 1.0], [1.0, 2.0])


def test_an_empty_timeline_is_left_out(tmp_path):
    empty = Timeline(time_s=[], allocated_bytes=[], phase_names=[], phase_start_s=[])
    group = group_of(tmp_path, [record("vanilla"), replace(record("ghost"), timeline=empty)])
    assert [plate.name[-10:] for plate in plates(group) if plate.shelf == "timeline"] == ["easured-b4"]


def test_numbers_are_told_as_ranges():
    assert ranges((1, 2, 3, 7, 9, 10)) == "1–3, 7, 9–10"
