"""Counters with stable names: a dictionary that says what may be counted.

Names carry their unit (``_seconds``, ``_bytes``, ``_total``). A label is appended after
a colon: ``refusals_total:E_NOT_ADMITTED``.
"""

from __future__ import annotations

from collections import Counter

BUGS = "bugs_total"
"""Unexpected exceptions caught at the one handler boundary."""
REFUSALS = "refusals_total"
"""Requests refused by a gate or a validating door, labelled by code."""
PROTOCOL_ERRORS = "protocol_errors_total"
"""Malformed messages, labelled by package."""
DROPPED = "dropped_total"
"""Items dropped because a bounded queue was full, labelled by queue."""
SENT_BYTES = "sent_bytes"
"""Bytes sent, labelled by plane."""
RECEIVED_BYTES = "received_bytes"
"""Bytes received, labelled by plane."""


class Counters:
    """Monotone counters of one process."""

    def __init__(self) -> None:
        self._values: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1, *, label: str = "") -> None:
        """Add ``amount`` to ``name``, or to its ``label``."""
        self._values[f"{name}:{label}" if label else name] += amount

    def snapshot(self) -> dict[str, int]:
        """Return all values by name."""
        return dict(self._values)
