"""Amounts as people write them: "16GiB", "100G", 5e10."""

from __future__ import annotations

import re

from fabric.core.errors import ConfigError

_SIZE = re.compile(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)B?\s*")
_POWER = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str | float) -> int:
    """Return the bytes of "16GiB", "500MB" or a plain number.

    Raises:
        ConfigError: it is none of these.
    """
    match = _SIZE.fullmatch(str(text))
    try:
        if match is None:
            return int(float(text))
        number, scale, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** _POWER[scale])
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{text!r} is not a size", next_step="write it as 16GiB or 500MB"
        ) from None


def size_text(size: float) -> str:
    """Return bytes for people, in powers of 1024."""
    power = 0
    while abs(size) >= 1024 and power < len(UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.3g} {UNITS[power]}"


def seconds_text(seconds: float) -> str:
    """Return a duration for people."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
