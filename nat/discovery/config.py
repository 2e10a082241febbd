"""Settings of discovery: bootstraps, the local network, rendezvous points."""

from __future__ import annotations

from typing import Annotated

import msgspec

Bootstrap = Annotated[str, msgspec.Meta(max_length=300)]


class DiscoveryConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How members of this mesh find each other when addresses changed.

    Attributes:
        bootstrap: Multiaddrs with ``/p2p/`` of peers to try besides those of the
            invite and those remembered; they also serve as rendezvous points.
        mdns: Announce this peer on the local network and look for members there.
        mdns_poll_seconds: How often our own addresses are compared with the announced
            ones.
        mdns_interfaces: IP addresses of the interfaces to announce on; empty takes all.
        rendezvous: Register at rendezvous points and ask them for members.
        rendezvous_serve: Keep registrations for others.
        rendezvous_points: Points to register at; two islands that share one of
            theirs find each other.
        rendezvous_ttl_seconds: How long a registration is asked to live; the spec
            implies 2 h, and a point may refuse less.
        discover_seconds: Mean pause between two questions to one point.
        max_registrations: Registrations kept for others, in all.
        max_stranger_registrations: Of these, for peers that are not members.
        max_registrations_per_peer: Namespaces of one peer.
    """

    bootstrap: Annotated[tuple[Bootstrap, ...], msgspec.Meta(max_length=32)] = ()
    mdns: bool = True
    mdns_poll_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 10.0
    mdns_interfaces: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()
    rendezvous: bool = True
    rendezvous_serve: bool = True
    rendezvous_points: Annotated[int, msgspec.Meta(ge=0, le=8)] = 3
    rendezvous_ttl_seconds: Annotated[int, msgspec.Meta(ge=60, le=259200)] = 7200
    discover_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    max_registrations: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 4096
    max_stranger_registrations: Annotated[int, msgspec.Meta(ge=0)] = 2048
    max_registrations_per_peer: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 16
