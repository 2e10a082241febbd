"""Settings of the control-plane host."""

from __future__ import annotations

import msgspec


class HostConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this peer listens, dials and keeps connections.

    Attributes:
        listen: Multiaddrs to listen on; port 0 lets the system choose. ``/ip6/::`` is
            left out, beside others, where there is no IPv6.
        announce: Multiaddrs to announce instead of the listening ones (a router that
            forwards a port); empty announces what we listen on.
        dial_seconds: One address may take this long to answer and to authenticate.
        upgrade_seconds: An inbound connection must authenticate within this.
        negotiate_seconds: A stream must agree on its protocol within this.
        keepalive_seconds: A connection silent for this long is pinged.
        dead_after_seconds: An unanswered ping closes the connection after this.
        stall_seconds: A writer waits this long for a reader that reads nothing; longer
            than any step of a job, because a reader may be busy computing.
        window_bytes: Bytes a peer may have in flight on one stream, at most.
        max_streams: Streams on one connection, each direction.
        max_connections: Connections in all.
        max_dials: Addresses of one peer that are tried at once.
    """

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    announce: tuple[str, ...] = ()
    dial_seconds: float = 10.0
    upgrade_seconds: float = 10.0
    negotiate_seconds: int = 10
    keepalive_seconds: float = 15.0
    dead_after_seconds: float = 15.0
    stall_seconds: float = 600.0
    window_bytes: int = 1 << 20
    max_streams: int = 256
    max_connections: int = 300
    max_dials: int = 16


class GossipConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How gossip spreads.

    Attributes:
        degree: Neighbours in the mesh of a topic; low and high are its bounds.
        degree_low: Below this the heartbeat grafts.
        degree_high: Above this the heartbeat prunes.
        heartbeat_seconds: Interval of mesh maintenance, in whole seconds.
        max_messages_per_second: One neighbour may forward this many; the rest is
            dropped and counted. Two seconds' worth may come at once.
        subscriber_messages: Room of one subscriber's channel; overflow is dropped.
        repair_seconds: A connected peer without a gossip stream gets one this often.
    """

    degree: int = 6
    degree_low: int = 4
    degree_high: int = 12
    heartbeat_seconds: int = 1
    max_messages_per_second: float = 200.0
    subscriber_messages: int = 256
    repair_seconds: float = 5.0


class RoutingConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How provider records are published and found.

    Attributes:
        replicas: Closest peers that are asked to store a record (k).
        store_interval_seconds: Pause between two records sent to one peer; peers refuse
            more than ten in ten seconds.
        query_seconds: One peer may take this long to answer.
        search_seconds: A search ends after this with what it has found.
        parallel: Peers asked at once (alpha).
    """

    replicas: int = 20
    store_interval_seconds: float = 1.0
    query_seconds: float = 10.0
    search_seconds: float = 6.0
    parallel: int = 10
