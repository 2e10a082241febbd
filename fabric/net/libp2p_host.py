"""The Host on py-libp2p: TCP, Noise and yamux, nothing else.

What is ours and why: the dialer (py-libp2p tries one address per transport, waits
250 ms after each success and blacklists a failed peer for 60 s), the muxer, the Noise
session, the listener and the boundary of inbound streams; each has a module of its own,
named ``libp2p_*``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr

from fabric.core.errors import (
    PeerTimeout,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import PeerId, public_key_of, short
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import DROPPED, Counters
from fabric.net.config import HostConfig
from fabric.net.host import PeerConnected, PeerDisconnected, PeerEvent, StreamHandler
from fabric.net.libp2p_dialer import dial
from fabric.net.libp2p_inbound import OWN_PREFIX, InboundStreams
from fabric.net.libp2p_muxer import FabricMuxer
from fabric.net.libp2p_stream import Libp2pStream, reset
from fabric.net.libp2p_swarm import build
from fabric.net.libp2p_transport import bind
from fabric.net.ports import Gate
from fabric.net.tasks import collapse_group

log = logging.getLogger(__name__)

EVENT_ROOM = 256
"""Events a slow listener may lag behind; a peer makes two per connection."""
CLOSE_SECONDS = 5.0
"""Grace for an orderly end of the host."""
_NEVER_SECONDS = 10**9


class Libp2pHost:
    """See :class:`fabric.net.host.Host`. Made by :func:`open_host`.

    Attributes:
        basic: The py-libp2p host, for the adapters of this package only.
        gate: Who may open what.
        counters: Where refusals and errors are counted.
    """

    def __init__(
        self,
        config: HostConfig,
        basic: BasicHost,
        swarm: Swarm,
        gate: Gate,
        counters: Counters,
    ) -> None:
        self.basic = basic
        self.gate = gate
        self.counters = counters
        self._config = config
        self._swarm = swarm
        self._peer_id = PeerId(str(basic.get_id()))
        self._client = MultiselectClient()
        self._live: set[PeerId] = set()
        self._listeners: list[trio.MemorySendChannel[PeerEvent]] = []
        inbound = InboundStreams(basic, gate, counters, config.negotiate_seconds)
        swarm.set_stream_handler(inbound.serve)
        swarm.register_notifee(_Notifee(self))

    @property
    def peer_id(self) -> PeerId:
        """This host's identity."""
        return self._peer_id

    def addrs(self) -> tuple[str, ...]:
        """Return the multiaddrs others can dial, each ending in ``/p2p/<peer id>``."""
        return tuple(str(addr) for addr in self.basic.get_addrs())

    def connected(self) -> frozenset[PeerId]:
        """Return the peers with a live control connection."""
        return frozenset(
            PeerId(str(peer))
            for peer, connections in self._swarm.get_connections_map().items()
            if any(_is_live(connection) for connection in connections)
        )

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """Return a new bounded channel of connection events (overflow is dropped)."""
        send, receive = trio.open_memory_channel[PeerEvent](EVENT_ROOM)
        self._listeners.append(send)
        return receive

    async def connect(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Have a live connection with ``peer``; all ``addrs`` are tried at once.

        Raises:
            NoRoute: no address answered; the reason lists each address and its error.
            IntegrityError: something answered, but not as ``peer``.
        """
        public_key_of(peer)
        if not self._connections(peer):
            await dial(
                self._swarm,
                peer,
                addrs[: self._config.max_dials],
                seconds=self._config.dial_seconds,
                connected=lambda: bool(self._connections(peer)),
            )

    async def open_stream(self, peer: PeerId, protocol: str) -> Libp2pStream:
        """Open a stream on the live connection with ``peer``.

        Raises:
            Unavailable: not connected, or the connection broke.
            RemoteRefused: the peer does not serve ``protocol`` to us.
        """
        return Libp2pStream(await self.open_raw(peer, protocol))

    async def open_raw(self, peer: PeerId, protocol: str) -> INetStream:
        """Do as :meth:`open_stream` does, for adapters of libp2p's own protocols."""
        stream = await self._raw_stream(peer)
        try:
            with trio.move_on_after(self._config.negotiate_seconds) as scope:
                await self._client.select_one_of(
                    [TProtocol(protocol)],
                    MultiselectCommunicator(stream),
                    _NEVER_SECONDS,
                )
                stream.set_protocol(TProtocol(protocol))
                return stream
        except MultiselectClientError as exc:
            reset(stream)
            if stream.muxed_conn.is_closed:
                raise Unavailable(f"{short(peer)} left: {exc}") from exc
            raise RemoteRefused(
                f"{short(peer)} does not serve {protocol} to us",
                code="E_PROTOCOL_REFUSED",
                next_step=f"check that {short(peer)} has admitted this peer",
            ) from exc
        except BaseException:
            reset(stream)
            raise
        reset(stream)
        assert scope.cancelled_caught
        raise PeerTimeout(f"{short(peer)} did not answer to {protocol}")

    async def _raw_stream(self, peer: PeerId) -> INetStream:
        broken = None
        for connection in self._connections(peer):
            try:
                return await connection.new_stream()
            except BaseLibp2pError as exc:
                broken = exc  # a second connection may still work
        if broken is not None:
            raise Unavailable(f"no stream to {short(peer)}: {broken}") from broken
        raise Unavailable(f"not connected with {short(peer)}", code="E_NOT_CONNECTED")

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol``, which starts with ``/fabric/``.

        The Gate is asked before the handler runs; a refusal resets the stream.
        """
        if not protocol.startswith(OWN_PREFIX):
            raise ValueError(f"{protocol!r} does not start with {OWN_PREFIX!r}")

        async def serve(stream: INetStream) -> None:
            peer = PeerId(str(stream.muxed_conn.peer_id))
            adapter = Libp2pStream(stream)
            await handler(peer, adapter)
            await adapter.aclose()

        self.basic.set_stream_handler(TProtocol(protocol), serve)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every control connection with ``peer``."""
        await self._swarm.close_peer(ID.from_base58(peer))

    def channel_binding(self, peer: PeerId) -> bytes:
        """Return the 32-byte Noise handshake hash of the connection with ``peer``.

        Two peers that dialed each other at once hold two connections; both take the
        smallest hash, so they agree.

        Raises:
            Unavailable: not connected.
        """
        hashes = [
            connection.muxed_conn.channel_binding
            for connection in self._connections(peer)
        ]
        if not hashes:
            raise Unavailable(
                f"not connected with {short(peer)}", code="E_NOT_CONNECTED"
            )
        return min(hashes)

    def _connections(self, peer: PeerId) -> list[INetConn]:
        connections = self._swarm.get_connections(ID.from_base58(peer))
        return [connection for connection in connections if _is_live(connection)]

    # connection events

    def note_connected(self, peer: PeerId) -> None:
        """Tell listeners of the first connection with ``peer``."""
        if peer not in self._live:
            self._live.add(peer)
            self._publish(PeerConnected(peer))

    def note_disconnected(self, peer: PeerId, reason: str) -> None:
        """Tell listeners when the last connection with ``peer`` is gone."""
        if peer in self._live and not self._connections(peer):
            self._live.discard(peer)
            self._publish(PeerDisconnected(peer, reason))

    def _publish(self, event: PeerEvent) -> None:
        for listener in tuple(self._listeners):
            try:
                listener.send_nowait(event)
            except trio.WouldBlock:
                self.counters.add(DROPPED, label="peer_events")
            except trio.BrokenResourceError:
                self._listeners.remove(listener)

    async def aclose(self) -> None:
        """Close all connections, all at once, then the host."""
        async with trio.open_nursery() as nursery:
            for peer in self._swarm.get_connections_map():
                nursery.start_soon(self._swarm.close_peer, peer)
        await self.basic.close()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()


class _Notifee(INotifee):
    """Passes the swarm's notifications on."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._host.note_connected(PeerId(str(conn.muxed_conn.peer_id)))

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        muxer: FabricMuxer = conn.muxed_conn
        self._host.note_disconnected(PeerId(str(muxer.peer_id)), muxer.why_reset)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


def _is_live(connection: INetConn) -> bool:
    return not (connection.is_closed or connection.muxed_conn.is_closed)


@asynccontextmanager
async def open_host(
    config: HostConfig, signer: Ed25519Signer, gate: Gate, counters: Counters
) -> AsyncIterator[Libp2pHost]:
    """Run a host; inside the block it listens, on exit all its connections are closed.

    Raises:
        ConfigError: a listening address is malformed or taken.
    """
    listen, tcp = await bind(config.listen)
    basic, swarm = build(config, signer.seed, tcp)
    host = Libp2pHost(config, basic, swarm, gate, counters)
    with collapse_group():
        try:
            async with basic.run(listen_addrs=listen):
                try:
                    yield host
                finally:
                    with trio.CancelScope(shield=True):
                        with trio.move_on_after(CLOSE_SECONDS):
                            await host.aclose()
        finally:
            await tcp.aclose()
