"""Settings of port mapping."""

from __future__ import annotations

from typing import Literal

import msgspec

Method = Literal["pcp", "nat-pmp", "upnp"]


class PortMapConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How this peer asks its router to forward ports.

    Attributes:
        enabled: Whether to ask at all.
        methods: What to try, the preferred one first.
        lease_seconds: Life of a mapping that nobody renews, such as after a crash.
        refresh_seconds: A mapping is asked for again this often, or at half its life
            if that is sooner: routers forget when they restart, and few say so.
        search_seconds: A router that answers nothing for this long is taken for mute.
        prefer_seconds: A preferred method may answer this much later than another.
        retry_seconds: First pause after a search without result; doubled each time.
        max_retry_seconds: Longest such pause.
        upnp_seconds: One UPnP operation may take this long before it is killed.
        close_seconds: Longest wait for the removal of the mappings at exit.
    """

    enabled: bool = True
    methods: tuple[Method, ...] = ("pcp", "nat-pmp", "upnp")
    lease_seconds: int = 3600
    refresh_seconds: float = 600.0
    search_seconds: float = 8.0
    prefer_seconds: float = 0.5
    retry_seconds: float = 60.0
    max_retry_seconds: float = 1800.0
    upnp_seconds: float = 6.0
    close_seconds: float = 3.0
