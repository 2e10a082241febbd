"""Periods and bounds of keeping copies of checkpoints."""

from __future__ import annotations

from typing import Annotated

import msgspec

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class ReplicationConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How this peer takes part in keeping copies. What it sends counts in data.budget.

    Attributes:
        enabled: Whether it fetches copies of what others wrote.
        period_seconds: Pause between two looks at who holds what.
        lost_after_seconds: A holder that is silent for so long is replaced.
        retry_seconds: A copy that failed here is not tried again before.
        call_timeout_seconds: One question to one peer.
        fetch_timeout_seconds: One copy; what arrived of it is kept.
    """

    enabled: bool = True
    period_seconds: Seconds = 30.0
    lost_after_seconds: Seconds = 300.0
    retry_seconds: Seconds = 600.0
    call_timeout_seconds: Seconds = 10.0
    fetch_timeout_seconds: Seconds = 3600.0
