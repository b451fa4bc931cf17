"""The record of a comparison: what was compared, how far predictions were off, and what it cannot say."""

from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

from memory_test.predict.emulator.cases import Case, allocator_options

if TYPE_CHECKING:
    from memory_test.core.measure import Measured

Result = dict[str, Any]

PEAKS = ("first_step_peak_allocated_bytes", "peak_allocated_bytes", "peak_reserved_bytes")

SCHEMA_VERSION = 1

WHAT = (
    "Predicted peaks against torch's CUDA build and its caching allocator on an emulated CUDA runtime: memory is "
    "counted, kernels do nothing, there is no GPU."
)

NOT_COVERED = (
    "A real GPU: neither the CUDA context, nor what the driver or a library takes by itself, nor fragmentation by "
    "addresses that the driver chooses, nor more than one stream.",
    "cuDNN: it is not emulated. Attention in bf16 is pinned to the flash kernel, convolution to torch's own "
    "(im2col and a product), on both sides; what cuDNN takes inside is not compared.",
    "A convolution in groups, which only opacus-functorch makes: torch's own kernel takes the groups one by one, which "
    "the prediction does not follow. That is its worst_phase_error; cuDNN takes them at once.",
    "cuBLASLt's choice of algorithm: the emulated one asks for no workspace beyond the one that torch hands it.",
    "Triton's kernels: a launch is left out, since it allocates nothing; results and the grids are the product's own. "
    "Compilation and tuning do not happen.",
    "Whatever depends on data: norms are taken to be finite, examples to keep apart, and Opacus's unique rows to be "
    "all distinct, on both sides; norm rules of auto are priced by counting, not timed.",
    "Initial weights are not drawn; that happens on the host.",
    "Versions: what is emulated is the build named in emulated_packages; predictions are made under the torch named in "
    "environment. Newer versions take cuBLAS's workspaces otherwise.",
    "torch.compile, several ranks, and more than one process on a card.",
)


def numbers(measured: "Measured") -> Result:
    """Return what both sides report of a memory pass."""
    repeat = measured.repeat
    return {
        "peaks": {name: getattr(repeat, name) for name in PEAKS},
        "phases": {n: [p.peak_allocated_bytes, p.peak_reserved_bytes] for n, p in repeat.phases.items()},
        "choices": measured.choices,
    }


def entry(case: Case, emulated: Result, predicted: Result) -> Result:
    """Return what is kept of one configuration.

    A side is `carried` if it was measured before an edit of its sources that was judged not to matter to it, so that
    it is not of the commit that the record names. The check itself carries nothing: it measures anew.
    """
    errors = {name: relative(predicted["peaks"][name], value) for name, value in emulated["peaks"].items()}
    phases = [
        relative(got, wanted)
        for name, wanteds in emulated["phases"].items()
        for got, wanted in zip(predicted["phases"][name], wanteds, strict=True)
    ]
    return {
        "name": case.name,
        "changes": case.changes,
        "allocator": {"options": allocator_options(case.settings), "memory_fraction": case.settings.memory_fraction},
        "emulated": emulated["peaks"],
        "predicted": predicted["peaks"],
        "relative_errors": errors,
        "worst_phase_error": max(phases, key=abs),
        "attention_kernels": emulated["choices"]["attention_kernels"],
        "choices_agree": same_choices(emulated["choices"], predicted["choices"]),
        "carried": [n for n, side in (("emulated", emulated), ("predicted", predicted)) if side.get("carried")],
        "retries": emulated["retries"],
        "allocator_actions": emulated["actions"],
        "allocator_first_difference": emulated["first_difference"],
        "seconds": {"emulated": emulated["seconds"], "predicted": predicted["seconds"]},
    }


def relative(got: int, wanted: int) -> float:
    """Return an error as a share of what is wanted."""
    return got / wanted - 1


def same_choices(emulated: Result, predicted: Result) -> bool:
    """Return whether the methods chose alike; a budget that was not asked for is what was free, to 1 %."""
    budget = "memory_budget_bytes"
    near = abs(relative(predicted.get(budget, 1), emulated.get(budget, 1))) < 0.01
    return near and {**predicted, budget: 0} == {**emulated, budget: 0}


def summary(entries: Iterable[Result], edges: Iterable[Result]) -> Result:
    """Return how far predictions were off."""
    entries, edges = list(entries), list(edges)
    found: Result = {"count": len(entries)}
    for name in entries[0]["relative_errors"]:
        errors = [abs(each["relative_errors"][name]) for each in entries]
        found[name] = {"median_relative_error": median(errors), "worst_relative_error": max(errors)}
    found["worst_phase_error"] = max(abs(each["worst_phase_error"]) for each in entries)
    found["choices_that_differ"] = sum(not each["choices_agree"] for each in entries)
    found["carried_results"] = sum(len(each["carried"]) for each in entries)
    found["allocator_actions"] = sum(each["allocator_actions"] for each in entries)
    found["allocator_runs_that_differ"] = sum(each["allocator_first_difference"] is not None for each in entries)
    found["edges"] = {
        "count": len(edges),
        "lowest_difference": min((each["predicted"] - each["emulated"] for each in edges), default=0),
        "highest_difference": max((each["predicted"] - each["emulated"] for each in edges), default=0),
    }
    return found
