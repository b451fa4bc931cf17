"""An inspection as text of 100 columns, or as JSON."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from memory_test.core.units import format_bytes
from memory_test.inspection.facts import Inspection, MethodVerdict
from memory_test.inspection.tree import tree_rows

WIDTH = 100
_GAP = "  "


def render_json(inspection: Inspection) -> str:
    """Return one JSON document whose keys are the fields of `facts.Inspection`, all the way down.

    Shapes are lists of integers, shares are fractions of 1, bytes are integers, unknown is ``null``:
    ``{schema_version, model, sizes{image_size, in_channels, latent_size, patch_size, num_tokens} | null,
    total_parameters, trainable_parameters, parameter_bytes_float32, frozen[], num_examples | null,
    shapes_unknown | null, modules[{name, type, parameters[{name, shape, trainable}], num_parameters,
    calls[{inputs, outputs, positional}]}], layer_types[{type, layers, parameters, share}],
    methods[{method, peer, supported, refusal | null, rules[{type, rule, reason, fix, layers[]}]}],
    validator_errors[{layer, type, message, fix}]}``.
    """
    return json.dumps(dataclasses.asdict(inspection), indent=1, ensure_ascii=False) + "\n"


def render_text(inspection: Inspection, *, max_depth: int = 3) -> str:
    """Return what people read.

    Args:
        inspection: What was found.
        max_depth: Levels of the module tree.
    """
    sections = [
        _headline(inspection),
        _modules(inspection, max_depth),
        _layer_types(inspection),
        _methods(inspection),
        _validator(inspection),
        _fixes(inspection),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


# --- sections -----------------------------------------------------------------------------------------------------


def _headline(inspection: Inspection) -> list[str]:
    frozen = len(inspection.frozen)
    names = ", ".join(inspection.frozen[:3]) + (f" and {frozen - 3} more" if frozen > 3 else "")
    trainable = f"{inspection.trainable_parameters:,}"
    rows = [
        (
            "parameters",
            f"{inspection.total_parameters:,} ({format_bytes(inspection.parameter_bytes_float32)} in float32)",
        ),
        ("trainable", trainable + (f"; frozen: {names}" if names else "")),
    ]
    sizes = inspection.sizes
    if sizes is not None:
        latent = f"{sizes.in_channels}×{sizes.latent_size}×{sizes.latent_size}"
        kind = "latent" if sizes.latent_size != sizes.image_size else "pixels"
        rows.append(("input", f"{sizes.image_size} px, {latent} {kind}"))
        rows.append(("tokens", f"T = {sizes.num_tokens}, patches of {sizes.patch_size}×{sizes.patch_size}"))
    if inspection.shapes_unknown:
        rows.append(("shapes", f"unknown: {inspection.shapes_unknown}"))
    return [inspection.model, *_table(rows, indent=2)]


def _modules(inspection: Inspection, max_depth: int) -> list[str]:
    rows = tree_rows(inspection, max_depth)
    shapes = any(row[3] for row in rows)
    head = ("", "type", "weight, bias", "input → output" if shapes else "")
    title = "Modules" + (" (N: examples)" if shapes and inspection.num_examples is not None else "")
    return [title, *_table([head, *rows], indent=2, maximum=(34, 22, 26))]


def _layer_types(inspection: Inspection) -> list[str]:
    rows = [("type", "layers", "parameters", "share")]
    rows += [
        (kind.type, f"{kind.layers:,}", f"{kind.parameters:,}", _share(kind.share)) for kind in inspection.layer_types
    ]
    return ["Trainable parameters by layer type", *_table(rows, indent=2, right=(1, 2, 3))]


def _share(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or share == 0 else "< 0.01%"


def _methods(inspection: Inspection) -> list[str]:
    lines = ["Methods, and how each obtains a layer's per-example gradient norm"]
    if inspection.shapes_unknown:
        lines.append("  Shapes unknown: layers called twice, unused layers and a moved batch dimension go unnoticed.")
    width = max(len(verdict.method) for verdict in inspection.methods)
    for verdict in inspection.methods:
        lines += ["", *_method(verdict, width)]
    return lines


def _method(verdict: MethodVerdict, width: int) -> list[str]:
    refused = sum(len(use.layers) for use in verdict.rules if use.rule == "none")
    if verdict.supported:
        state = "supported"
    elif refused:
        state = f"not supported: {refused} {'layer' if refused == 1 else 'layers'}"
    else:
        state = f"not supported: {verdict.refusal}"
    rows = [(f"{use.type} ×{len(use.layers)}", use.rule, use.reason) for use in verdict.rules]
    note = "" if verdict.rules or not verdict.supported else ": no clipping, no norms"
    head = _table([(verdict.method, state + note)], indent=2, minimum=(width,))
    return head + (_table(rows, indent=4, minimum=(14, 16), maximum=(24,)) if rows else [])


def _names(layers: Sequence[str]) -> str:
    return layers[0] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _validator(inspection: Inspection) -> list[str]:
    errors = inspection.validator_errors
    if not errors:
        return ["Opacus ModuleValidator: no errors"]
    rows = [(error.layer or "(model)", error.type, error.message.partition(". ")[0]) for error in errors]
    title = f"Opacus ModuleValidator: {len(errors)} {'error' if len(errors) == 1 else 'errors'}"
    return [title, *_table(rows, indent=2)]


def _fixes(inspection: Inspection) -> list[str]:
    """Say each way out once, with the methods that it opens."""
    methods: dict[tuple[str, str], list[str]] = {}
    for verdict in inspection.methods:
        for use in verdict.rules:
            if use.rule == "none":
                methods.setdefault((_names(use.layers), use.fix or "none known; freeze it"), []).append(verdict.method)
    for error in inspection.validator_errors:
        methods.setdefault((error.layer or "(model)", error.fix), [])
    private = [verdict.method for verdict in inspection.methods if verdict.rules]
    rows = [(f"{layer}: {fix}{_for(names, private)}",) for (layer, fix), names in methods.items()]
    return ["Fixes", *_table(rows, indent=2)] if rows else []


def _for(methods: list[str], private: list[str]) -> str:
    """Name the methods a fix is for, unless it is for all."""
    return "" if not methods or len(methods) == len(private) else f" (for {', '.join(methods)})"


# --- columns ------------------------------------------------------------------------------------------------------


def _table(
    rows: Iterable[Sequence[str]],
    *,
    indent: int,
    right: tuple[int, ...] = (),
    minimum: tuple[int, ...] = (),
    maximum: tuple[int, ...] = (),
) -> list[str]:
    """Lay rows out in columns of at most 100 characters together; what is too long wraps in its column.

    Args:
        rows: Equally long; leading spaces of a cell are kept.
        indent: Spaces before the first column.
        right: Columns that are aligned to the right.
        minimum: Least width per column, from the first.
        maximum: Greatest width per column, from the first; the last column gets what is left of the line.
    """
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for i, least in enumerate(minimum):
        widths[i] = max(widths[i], least)
    for i, most in enumerate(maximum):
        widths[i] = min(widths[i], most)
    room = WIDTH - indent - len(_GAP) * (len(widths) - 1) - sum(widths[:-1])
    widths[-1] = min(widths[-1], max(room, 20))
    lines = []
    for row in cells:
        wrapped = [_cell(text, width, i in right) for i, (text, width) in enumerate(zip(row, widths, strict=True))]
        for texts in zip_longest(*wrapped, fillvalue=""):
            padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
            lines.append((" " * indent + _GAP.join(padded)).rstrip())
    return lines


def _cell(text: str, width: int, right: bool) -> list[str]:
    """Break a cell's text into lines, continued two spaces further in."""
    if len(text) <= width:
        return [text.rjust(width) if right else text]
    margin = " " * (len(text) - len(text.lstrip()))
    lines, line = [], margin
    for piece in _pieces(text.strip(), width - len(margin) - 2):
        if len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = margin + "  "
        line += piece
    return [*lines, line.rstrip()]


def _pieces(text: str, width: int) -> Iterable[str]:
    """Yield words, those too long for a line broken after dots and before capitals."""
    for word in text.split(" "):
        if len(word) <= width:
            yield word + " "
            continue
        yield from (piece for piece in re.split(r"(?<=\.)|(?<=[a-z0-9])(?=[A-Z])", word)[:-1] if piece)
        yield re.split(r"(?<=\.)|(?<=[a-z0-9])(?=[A-Z])", word)[-1] + " "
