"""Quantities as people read them: durations, bytes, counts, shares."""

from __future__ import annotations

_SECONDS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def duration(seconds: float | None) -> str:
    """Return seconds as ``20 ms``, ``3.5 s``, ``4.2 min``, ``1.5 h`` or ``2.1 d``."""
    if seconds is None:
        return "-"
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    if 0 < seconds < 0.95:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def size(num_bytes: float | None) -> str:
    """Return bytes with a decimal unit, as network and disk makers count."""
    return _scaled(num_bytes, _BYTES, " B", " ")


def count(number: float | None) -> str:
    """Return a count with a decimal unit, as models' sizes are given."""
    return _scaled(number, _COUNTS, "", "")


def rate(per_second: float | None) -> str:
    """Return floating-point operations a second."""
    return "-" if per_second is None else f"{per_second / 1e9:,.0f} GFLOP/s"


def flops(number: float | None) -> str:
    """Return a number of floating-point operations."""
    return _scaled(number, _FLOPS, " FLOP", " ")


def percent(share: float | None) -> str:
    """Return a share as per cent."""
    return "-" if share is None else f"{share:.1%}"


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of digits after the point."""
    return "-" if value is None else f"{value:.{digits}f}"


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], plain: str, gap: str) -> str:
    if value is None:
        return "-"
    for step, unit in units:
        if value >= step:
            return f"{value / step:.3g}{gap}{unit}"
    return f"{value:.0f}{plain}"
