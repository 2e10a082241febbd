"""Configuration of admission."""

from __future__ import annotations

from typing import Annotated

import msgspec

PositiveSeconds = Annotated[float, msgspec.Meta(gt=0, le=7 * 86400)]
HexDigest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class AttestationConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How often peers show evidence, and how much of it we serve."""

    reattest_interval_seconds: PositiveSeconds = 600.0
    """A result is fresh for 1.5 intervals and valid for two."""
    reattest_jitter: Annotated[float, msgspec.Meta(ge=0, le=0.4)] = 0.2
    """Fraction by which each wait varies, so that peers do not attest in step."""
    exchange_timeout_seconds: PositiveSeconds = 20.0
    """Whole exchange; a discrete TPM needs most of a second for one quote."""
    max_exchanges: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    """Inbound exchanges served at once."""
    peer_attempts_per_minute: Annotated[int, msgspec.Meta(ge=1, le=600)] = 6
    """Inbound attempts of one peer; two intervals need none of them."""
    newcomer_attempts_per_minute: Annotated[int, msgspec.Meta(ge=1, le=6000)] = 120
    """Inbound attempts of all peers that are not members yet. Members do not count."""
    allowed_measurements: tuple[HexDigest, ...] = ()
    """Accepted software measurements; empty accepts and reports any."""
    allow_suspect: bool = True
    """Keep connections of a peer that missed one interval; it gets no new work."""
    seek_on_connect: bool = True
    """Attest with every peer we connect to, and again each interval."""
