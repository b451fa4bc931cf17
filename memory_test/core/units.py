"""Integer bytes are stored; GiB (2**30) and MiB (2**20) are for people."""

KIB = 2**10
MIB = 2**20
GIB = 2**30


def format_bytes(num_bytes: int | float | None) -> str:
    """Return a size for people: ``1.50 GiB``, ``12.3 MiB``, ``512 B``; an em dash for `None`."""
    if num_bytes is None:
        return "—"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            value = num_bytes / unit
            return f"{value:.2f} {name}" if value < 100 else f"{value:,.0f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """Return a duration for people: ``1.23 s``, ``45.6 ms``, ``3 min 20 s``; an em dash for `None`."""
    if seconds is None:
        return "—"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
