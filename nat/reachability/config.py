"""Settings of reachability: who is asked, how often, and what others may ask of us."""

from __future__ import annotations

import msgspec


class AutonatConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What this peer dials for others who ask whether they are reachable.

    Attributes:
        serve: Whether to answer such requests at all.
        per_peer_minute: Requests of one peer, and of one IP, that are served.
        total_minute: Requests of all.
        data_minute: Requests of all whose target is not the asker's IP; each makes the
            asker send up to 100 KB.
        max_dials: Dial-backs under way at once.
        dial_seconds: One dial-back may take this long.
        request_seconds: One request may take this long, dial data included.
    """

    serve: bool = True
    per_peer_minute: int = 12
    total_minute: int = 60
    data_minute: int = 12
    max_dials: int = 8
    dial_seconds: float = 5.0
    request_seconds: float = 15.0


class ReachabilityConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How this peer learns whether others can reach it.

    Attributes:
        max_servers: Peers that are asked in one round.
        min_agreeing: Servers that must have reached an address before it is public;
            where fewer exist, all of them, and the confidence is low.
        max_addresses: Own addresses that are checked in one round.
        stable_seconds: Between rounds while the verdict stands.
        first_retry_seconds: After a round without a verdict; doubles up to
            stable_seconds.
        settle_seconds: Events (a new peer, a changed network) are gathered this long.
        max_announced: Addresses that others are told, at most.
        announce_lan: Whether to tell addresses that only peers of this site can use.
        autonat: What is done for others.
    """

    max_servers: int = 5
    min_agreeing: int = 2
    max_addresses: int = 4
    stable_seconds: float = 900.0
    first_retry_seconds: float = 5.0
    settle_seconds: float = 0.5
    max_announced: int = 16
    announce_lan: bool = True
    autonat: AutonatConfig = AutonatConfig()
