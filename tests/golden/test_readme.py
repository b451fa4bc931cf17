"""The README's tables are what the committed records say; `--refresh-golden` writes them."""

import json
import re
from pathlib import Path
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
KINDS = "table|comparison|emulator|workloads|attention|pixels|norms|counts|off|mnist"
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
