"""Tables as text: Markdown, and aligned columns for a terminal."""

import html
import re
from collections.abc import Collection, Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Return a Markdown table; columns not in `left` are aligned to the right."""
    aligned = [":--" if column in left else "--:" for column in range(len(headings))]
    lines = [headings, aligned, *([escape(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Return a table in aligned columns; those not in `left` are aligned to the right."""
    table = [headings, *rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(headings))]
    lines = [
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    text = html.escape(text, quote=False)
    return " ".join(re.sub(r"([\\`*_\[\]|])", r"\\\1", text).split())
