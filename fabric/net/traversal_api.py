"""The host as traversal sees it: connections over streams that are not its own dials.

``nat`` makes a byte stream to a peer (a circuit through a relay, a punched socket); the
host runs Noise and yamux on it, after which it is a control connection like others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

import msgspec
import trio

from fabric.core.ids import PeerId
from fabric.net.host import Host

ConnectionKind = Literal["direct", "punched", "relay"]


class ConnectionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a control connection came about.

    Attributes:
        kind: What carries it.
        outbound: Whether we are the initiator of its security handshake.
        local: "ip:port" of our end of the socket; empty on a relay.
        remote: "ip:port" of the other end; empty on a relay.
        relay: The relay's id when ``kind`` is "relay".
    """

    kind: ConnectionKind
    outbound: bool
    local: str = ""
    remote: str = ""
    relay: PeerId | None = None


CircuitDialer = Callable[
    [str, PeerId], Awaitable[tuple[trio.abc.Stream, ConnectionInfo]]
]
"""Given ``/ip4/../p2p/RELAY`` and a peer, return the circuit's bytes, before Noise.

Raises NoRoute or RemoteRefused with the relay's reason.
"""


class TraversalHost(Host, Protocol):
    """What ``nat`` needs of the host beyond :class:`fabric.net.host.Host`.

    A stream to a peer is opened on its best connection: direct or punched before relay,
    then the newest. Streams that are open stay where they are.
    """

    def connections(self, peer: PeerId) -> tuple[ConnectionInfo, ...]:
        """Return the live connections with ``peer``, best first."""
        ...

    async def adopt(
        self, peer: PeerId, stream: trio.abc.Stream, info: ConnectionInfo
    ) -> None:
        """Have a connection with ``peer`` over ``stream``, which the host then owns.

        Runs the security handshake (as initiator if ``info.outbound``) and the muxer.

        Raises:
            IntegrityError: the other end is not ``peer``; the stream is closed.
            Unavailable: the stream broke or took too long.
        """
        ...

    async def close_connections(self, peer: PeerId, kind: ConnectionKind) -> None:
        """Close the connections of one kind with ``peer``."""
        ...

    def set_circuit_dialer(self, dial: CircuitDialer) -> None:
        """Use ``dial`` for addresses that contain ``/p2p-circuit``."""
        ...

    def listen_addrs(self) -> tuple[str, ...]:
        """Return what we listen on, wildcards expanded, without ``/p2p/``."""
        ...

    def announce(self, addrs: Sequence[str]) -> None:
        """Let ``addrs()`` and identify give these instead (each without our id)."""
        ...
