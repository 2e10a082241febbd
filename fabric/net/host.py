"""The Host: what the rest of the project may know about the control plane.

Two implementations, one conformance suite (``tests/net/check_host.py``):
``libp2p_host.open_host`` and ``memory_host.MemoryNetwork``.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec
import trio

from fabric.core.ids import PeerId

StreamHandler = Callable[[PeerId, trio.abc.Stream], Awaitable[None]]
"""Serves one inbound stream. The host closes the stream when it returns or raises."""
OpenStream = Callable[[PeerId, str], Awaitable[trio.abc.Stream]]
"""Opens a stream of a protocol with a peer, as :meth:`Host.open_stream` does."""
TakeSocket = Callable[[socket.socket], None]
"""Owns a connected, non-blocking socket from then on."""


class PeerConnected(msgspec.Struct, frozen=True, tag="connected"):
    """The first control connection with ``peer`` is up."""

    peer: PeerId


class PeerDisconnected(msgspec.Struct, frozen=True, tag="disconnected"):
    """The last control connection with ``peer`` is gone."""

    peer: PeerId
    reason: str = ""


class PeerReconnected(msgspec.Struct, frozen=True, tag="reconnected"):
    """One control connection more with ``peer``: it may have lost the others."""

    peer: PeerId


PeerEvent = PeerConnected | PeerReconnected | PeerDisconnected


class Host(Protocol):
    """Dial peers, open and serve streams. Every peer is authenticated by its PeerId."""

    @property
    def peer_id(self) -> PeerId:
        """This host's identity."""
        ...

    def addrs(self) -> tuple[str, ...]:
        """Return the multiaddrs others can dial, each ending in ``/p2p/<peer id>``."""
        ...

    def connected(self) -> frozenset[PeerId]:
        """Return the peers with a live control connection."""
        ...

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """Return a new bounded channel of connection events (overflow is dropped)."""
        ...

    async def connect(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Have a live connection with ``peer``; all ``addrs`` are tried at once.

        Bound it with ``trio.fail_after`` at the call site.

        Raises:
            NoRoute: no address answered; the reason lists each address and its error.
            IntegrityError: something answered, but not as ``peer``.
        """
        ...

    async def open_stream(self, peer: PeerId, protocol: str) -> trio.abc.Stream:
        """Open a stream on the live connection with ``peer``.

        Raises:
            Unavailable: not connected, or the connection broke.
            RemoteRefused: the peer does not serve ``protocol`` to us.
        """
        ...

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol``.

        The host asks its Gate before the handler runs and refuses with a reset.
        """
        ...

    def share_listener(self, take: TakeSocket) -> None:
        """Give inbound connections that do not speak the host's protocol to ``take``.

        It is called with a connected, non-blocking socket of which nothing was read. A
        host without a socket of its own never calls it.
        """
        ...

    async def disconnect(self, peer: PeerId) -> None:
        """Close every control connection with ``peer``."""
        ...

    def channel_binding(self, peer: PeerId, stream: trio.abc.Stream) -> bytes:
        """Return bytes that both ends of one connection, and no other, share.

        The Noise handshake hash (Noise spec section 11.2) or TLS exporter, 32 bytes.

        Args:
            peer: The other end.
            stream: Of this host, with ``peer``. Its connection counts: of several that
                come and go, the two ends do not know the same at one moment.
        """
        ...
