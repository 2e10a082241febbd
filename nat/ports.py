"""What traversal needs: from the services below it, and from above."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from fabric.core.ids import MeshId, PeerId
from fabric.core.signing import Signer
from fabric.core.telemetry import Counters
from fabric.net.data_plane import DataPlane
from fabric.net.ports import Gate
from fabric.net.traversal_api import TraversalHost
from nat.reachability.autonat_service import DialBackPort
from nat.reachability.netwatch import NetworkChanged
from nat.reachability.survey_service import Identify

Learn = Callable[[str, Mapping[PeerId, Sequence[str]]], None]
"""Takes addresses of peers as hints; the first argument is who says so."""


@dataclass(frozen=True)
class TraversalNeeds:
    """What traversal needs from above; all but ``upgrade`` answer from memory.

    Attributes:
        addresses_of: Multiaddrs at which a peer may be, circuits among them.
        relays: Peers that may relay for us, best first, with their addresses.
        observers: "ip:port" of data-plane listeners that the world reaches.
        points: Rendezvous points to consider, best first.
        is_member: Whether a peer is a member of our mesh.
        learn: Takes what discovery found.
        relayed: Peers whose RPC is on a relay.
        direct: Peers whose RPC needs none.
        upgrade: Moves one of them to a better path.
        network_changed: Told after this package's parts.
    """

    addresses_of: Callable[[PeerId], Sequence[str]]
    relays: Callable[[], Mapping[PeerId, Sequence[str]]]
    observers: Callable[[], Sequence[str]]
    points: Callable[[], Sequence[PeerId]]
    is_member: Callable[[PeerId], bool]
    learn: Learn
    relayed: Callable[[], frozenset[PeerId]]
    direct: Callable[[], frozenset[PeerId]]
    upgrade: Callable[[PeerId], Awaitable[None]]
    network_changed: Callable[[NetworkChanged], None]


@dataclass(frozen=True)
class TraversalBase:
    """The services below, and who we are.

    Attributes:
        host: The control plane.
        plane: The data plane.
        gate: Who may open what.
        signer: Our identity.
        mesh: Whose members discovery looks for.
        identify: Asks a peer where it sees us.
        dial_back: Dials for peers that ask whether they are reachable.
        counters: Refusals, errors, drops.
    """

    host: TraversalHost
    plane: DataPlane
    gate: Gate
    signer: Signer
    mesh: MeshId
    identify: Identify
    dial_back: DialBackPort
    counters: Counters
