"""Configuration of the content service."""

from __future__ import annotations

from typing import Annotated

import msgspec

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class ContentConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Bounds and periods of fetching, serving and announcing content."""

    max_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] = 100 << 30
    """Disk the store may use."""
    max_sources: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    """Peers one download uses at once, each with one connection and one thread."""
    window_blocks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Blocks asked of one peer ahead of its answers."""
    call_timeout_seconds: Seconds = 10.0
    """One RPC, one dial, one look-up of providers."""
    block_timeout_seconds: Seconds = 30.0
    """Silence after which a peer's blocks are asked of others."""
    stall_timeout_seconds: Seconds = 120.0
    """A download that gets no block for so long fails; what it has is kept."""
    search_interval_seconds: Seconds = 10.0
    """How often a download looks for more providers and asks what partial ones hold."""
    holders_wait_seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 30.0
    """While every known holder is out of reach (an uplink changed, a router restarts),
    a download waits this long for one to come back, then fails; 0 does not wait."""
    source_retry_seconds: Seconds = 0.5
    """Wait before the next connection to a peer that broke off; doubles."""
    source_retry_max_seconds: Seconds = 2.0
    """Longest of these waits."""
    manifest_stagger_seconds: Seconds = 1.0
    """Wait for one peer's manifest before the next peer is asked as well."""
    republish_seconds: Seconds = 3600.0
    """Provider records live longer; ours are renewed this often."""
