"""The README's tables are what the committed records say; `--refresh-golden` writes them."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from memory_test.compare.schema import load
from memory_test.compare.table import summary
from memory_test.core import store
from memory_test.core.units import format_bytes
from memory_test.report.frames import load_frame
from memory_test.report.markdown import excerpt
from memory_test.report.systems import naive_attention_bytes, systems_page

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
KINDS = "table|comparison|emulator|workloads|attention|pixels|norms|counts|off|mnist|gpu|gpupeaks"
MARKED = re.compile(rf"<!-- ({KINDS}): (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def generated(kind: str, folder: Path) -> str:
    """Return what stands between the marks."""
    if kind == "table":
        return excerpt(load_frame(folder))
    if kind == "workloads":
        return systems_page(load_frame(folder))
    if kind == "attention":
        return attention_line(folder)
    if kind == "pixels":
        return pixels_line(folder)
    if kind in FOLDERS:
        return FOLDERS[kind](folder)
    if kind in PAGES:
        return PAGES[kind](json.loads((folder / "record.json").read_text(encoding="utf-8")))
    if kind == "emulator":
        return emulated(json.loads(folder.read_text(encoding="utf-8")))
    comparisons = [load(path) for path in folder.glob("*.json")]
    return summary(sorted(comparisons, key=lambda comparison: comparison.created_at))


def attention_line(folder: Path) -> str:
    """Return what predictions say of attention that keeps its matrices."""
    naive, fused = (store.load(folder / f"{kernel}.json") for kernel in ("math", "efficient"))
    config, heads = naive.config_resolved, naive.config_resolved["num_heads"]
    taken = naive_attention_bytes(naive, fused)
    matrix = 4 * heads * config["num_tokens"] ** 2
    return (
        f"Attention that keeps its matrices takes {taken / 1e6:.0f} MB more by example and layer than a fused kernel "
        f"on {config['model']}: {taken / matrix:.2f} matrices of {matrix / 1e6:.0f} MB ({heads} heads x "
        f"{config['num_tokens']}² x 4 B); predicted, float32, on CUDA.\n"
    )


def pixels_line(folder: Path) -> str:
    """Return what predictions say of one image of many tokens."""
    records = {method: store.load(folder / f"{method}.json") for method in ("vanilla", "lean")}
    held: dict[str, tuple[int, int, int]] = {}
    for method, record in records.items():
        (repeat,) = record.repeats
        assert repeat.peak_allocated_bytes is not None
        assert repeat.first_step_peak_allocated_bytes is not None
        fixed = sum(repeat.breakdown_bytes[name] for name in ("parameters", "gradients", "optimizer_state"))
        peak = repeat.peak_allocated_bytes
        held[method] = peak, peak - fixed, repeat.first_step_peak_allocated_bytes
    config = records["vanilla"].config_resolved
    (whole, ordinary, _), (peak, rest, first) = held["vanilla"], held["lean"]
    what = f"{config['model']} ({config['in_channels']} channels, float32; predicted)"
    share = f"{rest / ordinary:.2f} of ordinary training's"
    return (
        f"One image of {config['num_tokens']:,} tokens on {what}:\n"
        f"ordinary training peaks at {format_bytes(whole)}, {format_bytes(ordinary)} of it beyond parameters, "
        f"gradients and optimizer\nstate; `lean` at {format_bytes(peak)}, {format_bytes(rest)} beyond them: {share}. "
        f"Its first step, with trials,\npeaks at {format_bytes(first)}.\n"
    )


def norms_page(record: dict[str, Any]) -> str:
    """Return what per-example norms cost by either rule, counted and, of two layers, timed."""
    counted, timed = record["multiply_adds"], record["timed"]
    lines = [
        "| system | linear layers that train | ghost | direct | cheaper, by layer |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for system, costs in counted.items():
        shares = " | ".join(f"{costs[rule] / costs['training']:.3f}" for rule in ("ghost", "direct", "cheaper"))
        lines.append(f"| {system} | {costs['layers']} | {shares} |")

    def said(system: str) -> str:
        layer, ratio = timed[system], timed[system]["ghost_over_direct"]
        shape = f"{layer['width']} → {layer['out_width']}, T = {layer['positions']}"
        return f"{ratio['median']:.2g} times at `{layer['name']}` ({shape})"

    ddt = counted["ddt"]
    modulation = ddt["modulation_by_token"]
    lines += [
        "",
        "Multiply-adds of per-example norms over those of the layers' ordinary training. Timed on one thread, ghost "
        f"norms take, of direct ones' time, {said('panda')} on panda, {said('ddt')} on DDT. The latter is modulation "
        f"for every token of DDT's head: its {modulation['layers']} layers take "
        f"{modulation['training'] / ddt['training']:.1%} of the multiply-adds and save "
        f"{modulation['output_bytes'] / 2**20:.0f} MiB an example, where modulation for an example would save a 256th.",
    ]
    return "\n".join(lines) + "\n"


def mnist_table(record: dict[str, Any]) -> str:
    """Return what runs on MNIST and their samples came to."""
    lines = [
        "| trained with | noise multiplier | steps | training | peak memory | examples/s | CNN | logistic regression |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    names = {"eps10": "ε = {epsilon:.2f}, δ = {delta:g}", "inf": "no noise, no privacy"}
    for key, name in names.items():
        run = record["runs"][key]
        title = name.format(epsilon=run["epsilon"] or 0, delta=run["delta"])
        accuracy = run["accuracy"]
        lines.append(
            f"| {title} | {run['noise_multiplier']:.3f} | {run['steps']} | {run['seconds'] / 60:.1f} min | "
            f"{run['peak_memory_bytes'] / 2**20:.0f} MiB | {run['examples_per_s']:.0f} | "
            f"{accuracy['cnn_accuracy']:.1%} | {accuracy['logistic_accuracy']:.1%} |"
        )
    real, run = record["real"], record["runs"]["eps10"]
    lines += [
        f"| (the real training images) | | | | | | {real['cnn_accuracy']:.1%} | {real['logistic_accuracy']:.1%} |",
        "",
        f"Accuracy on {real['num_test']} held-out real digits of classifiers trained on "
        f"{run['accuracy']['num_samples']} samples alone; {run['num_units']} training images, "
        f"{run['num_trainable_parameters']:,} parameters, method `{run['method']}`, {run['num_threads']} threads; "
        f"memory: {run['peak_memory_is']}.",
    ]
    return "\n".join(lines) + "\n"


def emulated(record: dict[str, Any]) -> str:
    """Return what the comparison with the emulated runtime showed."""
    summary, edges = record["summary"], record["summary"]["edges"]
    allocated, reserved = summary["peak_allocated_bytes"], summary["peak_reserved_bytes"]
    apart = max(abs(edges["lowest_difference"]), abs(edges["highest_difference"]))
    older = summary["carried_results"]
    carried = f", and which {older} of {2 * summary['count']} results are of an earlier commit" if older else ""
    lines = [
        f"against torch's CUDA build ({record['emulated_packages']['torch']}) and its real caching allocator on an "
        "**emulated** CUDA runtime,",
        f"{summary['count']} configurations: peak allocated off by {allocated['median_relative_error']:.3%} (median), "
        f"{allocated['worst_relative_error']:.3%} (worst); reserved by",
        f"{reserved['median_relative_error']:.3%} and {reserved['worst_relative_error']:.3%}; the largest batch that "
        f"fits a card differs by at most {apart} in {edges['count']} cases",
        "([record](results/prediction/emulator.json), [figure](results/prediction/emulator.png), "
        f"`make emulator-check`; the record says what it does not cover{carried}).",
    ]
    return "\n".join(lines) + "\n"


def counts_line(record: dict[str, Any]) -> str:
    """Return what a full run of the tests checked, and how often."""
    counts = "; ".join(f"{count['passed']} {what}" for what, count in record["counts"].items())
    commit = record["environment"]["commit"][:12]
    return f"Checked by `make test-full` ([record](results/tests/record.json), commit {commit}): {counts}.\n"


def off_line(record: dict[str, Any]) -> str:
    """Return how far predictions are off on the CPU."""
    peak, first, rank = (
        record["off"][f"predicted {what} on the CPU"]
        for what in (
            "peak_allocated_bytes, one process",
            "first_step_peak_allocated_bytes, one process",
            "peak_allocated_bytes, rank 0 of two",
        )
    )
    return (
        f"Against the **CPU** allocator's true peak, in {peak['cases']} configurations, every method on every workload "
        f"that takes it among them: off by {peak['median']:.3%} (median), {peak['worst']:.2%} (worst), a first step's "
        f"by {first['worst']:.2%} at most; rank 0 of two processes, in {rank['cases']}, by {rank['worst']:.2%} at most "
        f"([record](results/tests/record.json), `make test-full`).\n"
    )


def gpu_table(folder: Path) -> str:
    """Return methods at the largest batches: `auto` from the paired comparison, peers from steps of their own."""
    pair = load(folder / "ratios-edge" / "t256-n128.json")
    auto, ordinary = (next(c for c in pair.contenders if c.label == label) for label in ("auto", "vanilla"))
    found = {}
    for path in (folder / "largest").glob("*.json"):
        record = store.load(path)
        found[record.experiment, record.config_requested["image_size"]] = record

    def seconds(name: str, size: int) -> float:
        return median(found[name, size].step_times_s)

    def peer(size: int) -> str:
        peaks = [format_bytes(found[name, size].peak_allocated_bytes) for name in ("vanilla", "opacus-ghost")]
        ratio = seconds("opacus-ghost", size) / seconds("vanilla", size)
        return f"{ratio:.2f} / {peaks[1]} (ordinary {1e3 * seconds('vanilla', size):.0f} ms / {peaks[0]})"

    ratio, bare, where = auto.time_ratio, auto.time_ratio_without_noise, pair.environment
    peaks = [format_bytes(contender.peak_allocated_bytes) for contender in (auto, ordinary)]
    lines = [
        "| DiT-XL/2, bf16 | 256 px, T = 256, batch 128 | 512 px, T = 1024, batch 32 |",
        "| :-- | :-- | :-- |",
        f"| `auto` | {ratio.median:.3f} ({bare.median:.3f} without the noise) / {peaks[0]} (ordinary "
        f"{1e3 * median(ordinary.step_times_s):.0f} ms / {peaks[1]}) | not yet measured |",
        f"| `opacus-ghost` | {peer(256)} | {peer(512)} |",
        "",
        f"{where.device_name}, torch {where.torch_version}, driver {where.driver_version}, commit {where.commit[:12]}. "
        f"At T = 256, `auto` takes {1 / ratio.median:.2f} of ordinary training's examples/s, "
        f"{seconds('opacus-ghost', 256) / median(auto.step_times_s):.2f} times those of Opacus's ghost clipping.",
    ]
    return "\n".join(lines) + "\n"


def gpu_peaks(folder: Path) -> str:
    """Return how far predictions are off on the GPU: where the same rules were chosen, and where not."""
    record = json.loads((folder / "prediction" / "report" / "prediction.json").read_text(encoding="utf-8"))
    cells, where = record["configurations"], record["environment"]
    same, others = ([c for c in cells if c["choices_agree"] == agree] for agree in (True, False))

    def errors(name: str) -> tuple[float, float]:
        found = [abs(cell["relative_errors"][f"peak_{name}_bytes"]) for cell in same]
        return median(found), max(found)

    allocated, reserved = errors("allocated"), errors("reserved")
    off = max(abs(cell["relative_errors"]["peak_allocated_bytes"]) for cell in others)
    pairs = []
    for path in (folder / "largest").glob("*.json"):
        measured = store.load(path)
        asked = measured.config_requested
        name = f"{measured.experiment}-{asked['image_size']}px-b{asked['batch_size']}.json"
        predicted = store.load(folder / "largest_predicted" / name).peak_allocated_bytes
        pairs.append(abs(predicted / measured.peak_allocated_bytes - 1))
    changed = " with local changes" if where["dirty"] else ""
    return (
        f"On an **H100**, {len(same)} small configurations, four at a time on the card: peak allocated off by "
        f"{allocated[0]:.3%} (median), "
        f"{allocated[1]:.2%} (worst); reserved by {reserved[0]:.2%} and {reserved[1]:.2%}. In {len(others)} more, of "
        f"`auto`, which times its rules on the device, here beside others, rules were chosen that were not predicted, "
        f"and memory was off by up to {off:.0%} (commit {where['commit'][:12]}{changed}; rules have since "
        f"been timed at the batch's own size, and that has not been compared again). At DiT-XL/2's largest batches, "
        f"{len(pairs)} configurations: off by {max(pairs):.3%} at most ([records](results/h100)).\n"
    )


FOLDERS = {"gpu": gpu_table, "gpupeaks": gpu_peaks}
"""Kinds that read several records of a folder."""

PAGES = {"norms": norms_page, "mnist": mnist_table, "counts": counts_line, "off": off_line}
"""Kinds whose folder holds one ``record.json``."""


def test_tables_come_from_the_committed_records(refresh_golden: bool) -> None:
    text = README.read_text(encoding="utf-8")

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- {match[1]}: {match[2]} -->\n{generated(match[1], ROOT / match[2])}<!-- end -->"

    wanted, count = MARKED.subn(replaced, text)
    assert count >= 3
    if refresh_golden:
        README.write_text(wanted, encoding="utf-8")
    assert text == wanted or refresh_golden


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
