"""What the campaign found, from the files that are there: needs no GPU, and may be run after any part."""

import dataclasses
import json
from pathlib import Path

from memory_test.campaign.agreement import Result, compared, edge_verdict, kept_targets, summary
from memory_test.campaign.budget import Pace
from memory_test.campaign.campaign import Outcome, Site
from memory_test.campaign.cases import Trial, load
from memory_test.campaign.edges import ALL_EDGES, FOLDER, largest_batch, tried
from memory_test.campaign.parts import PARTS, Part
from memory_test.campaign.tables import markdown, rows
from memory_test.core.store import load_folder, write_text
from memory_test.predict.cards import CARDS, Card
from memory_test.predict.emulator.build import ROOT
from memory_test.predict.emulator.cases import CASES
from memory_test.predict.emulator.figure import scatter
from memory_test.predict.emulator.sides import Kept, predict
from memory_test.report.palette import to_png, to_svg
from memory_test.report.report import write_report

DESCRIPTION = (
    "Each point is one configuration: its peak on the GPU, across, and the predicted one, up. On the line both agree."
)


def run_report(part: Part, site: Site, pace: Pace) -> Outcome:
    """Write whatever can be said from the files of the other parts."""
    card, left = CARDS[site.card], 0
    if (site.root / "prediction").is_dir():
        left = report_prediction(site, card, pace)
    if (site.root / FOLDER).is_dir():
        left += report_edges(site, card, pace)
    report_sweeps(site)
    return Outcome(done=1, left=left)


def report_prediction(site: Site, card: Card, pace: Pace) -> int:
    """Predict what was measured and compare; return how many predictions there was no time for."""
    folder, entries, left, environment = site.root / "prediction", [], 0, None
    predictions = Kept(ROOT / "build" / "campaign")
    for case in CASES:
        path = folder / Trial(case).file_name
        if not path.exists():
            continue
        measured = load(path)
        environment = measured["environment"]
        total = environment["device_memory_bytes"]
        on = dataclasses.replace(card, memory_bytes=total)
        if case.settings.memory_fraction is not None:  # a share of the whole, context included
            on = dataclasses.replace(card, memory_bytes=total + card.context_bytes)
        name = f"{case.name} on {card.name} of {on.memory_bytes} bytes"
        if pace.begin() is None:
            left += 1
            continue
        predicted = predictions.get("predicted", name, lambda case=case, on=on: predict(case, on))  # type: ignore[misc]
        entries.append(compared(measured, predicted))
        site.say(f"prediction: {case.name}: {_errors(entries[-1])}")
    if environment is not None and entries:
        _write_prediction(folder, environment, entries)
    return left


def _errors(entry: Result) -> str:
    if "relative_errors" not in entry:
        return ", ".join(f"{side} {status}" for side, status in entry["statuses"].items())
    return ", ".join(f"{100 * error:+.3f} %" for error in entry["relative_errors"].values())


def _write_prediction(folder: Path, environment: Result, entries: list[Result]) -> None:
    """Write the comparison, and draw it if there is anything to draw."""
    found = summary(entries)
    record: Result = {"schema_version": 1, "environment": environment, "summary": found, "configurations": entries}
    drawn = [entry for entry in entries if "relative_errors" in entry]
    if drawn:
        record["targets_kept"] = kept_targets(found)
        figure = scatter({"summary": found, "configurations": drawn}, "measured")
        title, place = "Predicted against measured peak memory", folder / "report"
        place.mkdir(exist_ok=True)
        write_text(place / "prediction.svg", to_svg(figure, title, DESCRIPTION))
        (place / "prediction.png").write_bytes(to_png(figure, title, DESCRIPTION))
    (folder / "report").mkdir(exist_ok=True)
    write_text(folder / "report" / "prediction.json", json.dumps(record, indent=1) + "\n")


def report_edges(site: Site, card: Card, pace: Pace) -> int:
    """Say of every edge that was tried whether the batch was right; return how many there was no time for."""
    folder, found, left = site.root / FOLDER, [], 0
    predictions, measured = Kept(folder / "predicted"), [load(path) for path in sorted(folder.glob("*.json"))]
    for edge in ALL_EDGES:
        statuses = tried(edge, measured)
        if not statuses:
            continue
        if pace.begin() is None:
            left += 1
            continue
        predicted = largest_batch(edge, card, predictions)
        verdict = edge_verdict(predicted, statuses)
        found.append({"name": edge.case.name, "usable_bytes": edge.usable_bytes, "predicted": predicted})
        found[-1] |= {"statuses": {str(batch): status for batch, status in statuses.items()}, "verdict": verdict}
        site.say(f"edges: {edge.case.name}: {predicted} predicted, {verdict}")
    if found:
        place = folder / "report"
        place.mkdir(exist_ok=True)
        write_text(place / "edges.json", json.dumps({"schema_version": 1, "edges": found}, indent=1) + "\n")
    return left


def report_sweeps(site: Site) -> None:
    """Write the report of every sweep that has records, and one table of methods for all of them."""
    tables = []
    for part in PARTS:
        folder = site.root / part.name
        if part.kind != "sweep" or not any(folder.glob("*.json")):
            continue
        write_report(folder, folder / "report", sorted(folder.glob("*.json")))
        if part.name != "smoke":
            records = [record for _, record in load_folder(folder, sorted(folder.glob("*.json")))]
            tables.append(markdown(part.what.partition(":")[0], rows(records)))
    if tables:
        write_text(site.root / "methods.md", "\n".join(tables))
