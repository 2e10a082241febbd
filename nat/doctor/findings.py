"""One line of a diagnosis, and how its parts are put into words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Status = Literal["ok", "warn", "fail"]
MAX_NAMED = 4
"""Peers or addresses named in a line; the rest is a number."""
RELAY_STEP = "on a member with a public address, run `fabric up --relay-ok`"
"""What to do where a relay is missing."""


class Finding(msgspec.Struct, frozen=True):
    """One line of ``fabric doctor``.

    Attributes:
        name: What was looked at; stable.
        status: How it stands.
        detail: What was found, with the facts.
        next_step: What to do about it; never empty unless ``status`` is "ok".
        code: Stable name of the finding, for machines; "OK" when fine.
    """

    name: str
    status: Status
    detail: str
    next_step: str = ""
    code: str = "OK"


def ok(name: str, detail: str) -> Finding:
    """Return that ``name`` is fine."""
    return Finding(name, "ok", detail)


def warn(name: str, code: str, detail: str, next_step: str) -> Finding:
    """Return that ``name`` works, but worse than it could, or is not known."""
    return Finding(name, "warn", detail, next_step, code)


def fail(name: str, code: str, detail: str, next_step: str) -> Finding:
    """Return that ``name`` keeps this peer from working."""
    return Finding(name, "fail", detail, next_step, code)


def not_measured(name: str, next_step: str) -> Finding:
    """Return that nobody measured ``name``, which is neither good nor bad news."""
    return warn(name, "E_NOT_MEASURED", "not measured", next_step)


def listed(items: Iterable[str]) -> str:
    """Return the first few of ``items`` and how many more there are."""
    all_ = list(items)
    more = len(all_) - MAX_NAMED
    text = ", ".join(all_[:MAX_NAMED])
    return f"{text} and {more} more" if more > 0 else text


def counted(number: int, noun: str) -> str:
    """Return "1 peer" or "2 peers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def rate(bytes_per_second: float) -> str:
    """Return a rate in Mbit/s."""
    return f"{bytes_per_second * 8 / 1e6:.3g} Mbit/s"


def milliseconds(seconds: float) -> str:
    """Return a duration in ms."""
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def duration(seconds: float) -> str:
    """Return a time span in its largest whole unit: "42 s", "5 min", "3 h", "2 d"."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
