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
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from multiaddr import Multiaddr

from fabric.core.errors import (
    LocalProtocolError,
    NoRoute,
    PeerTimeout,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import PeerId, public_key_of, short
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import DROPPED, Counters
from fabric.net.config import HostConfig
from fabric.net.host import (
    PeerConnected,
    PeerDisconnected,
    PeerEvent,
    PeerReconnected,
    StreamHandler,
    TakeSocket,
)
from fabric.net.libp2p_announce import AnnouncingHost
from fabric.net.libp2p_connections import Connections, is_live
from fabric.net.libp2p_dialer import CIRCUIT, dial
from fabric.net.libp2p_errors import libp2p_errors
from fabric.net.libp2p_guard import BoundedCommunicator
from fabric.net.libp2p_inbound import InboundStreams
from fabric.net.libp2p_muxer import FabricMuxer
from fabric.net.libp2p_stream import Libp2pStream, reset
from fabric.net.libp2p_swarm import build
from fabric.net.libp2p_transport import bind
from fabric.net.ports import Gate
from fabric.net.tasks import collapse_group
from fabric.net.traversal_api import CircuitDialer, ConnectionInfo, ConnectionKind

log = logging.getLogger(__name__)

EVENT_ROOM = 256
"""Events a slow listener may lag behind; a peer makes two per connection."""
CLOSE_SECONDS = 5.0
"""Grace for an orderly end of the host."""
_NEVER_SECONDS = 10**9


class Libp2pHost:
    """See :class:`fabric.net.traversal_api.TraversalHost`. Made by :func:`open_host`.

    Attributes:
        basic: The py-libp2p host, for the adapters of this package only.
        gate: Who may open what.
        counters: Where refusals and errors are counted.
        links: The connections, also for the adapters.
    """

    def __init__(
        self,
        config: HostConfig,
        basic: AnnouncingHost,
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
        self.links = Connections(swarm, config.upgrade_seconds)
        self._circuit_dialer: CircuitDialer | None = None
        self._inbound = InboundStreams(basic, gate, counters, config.negotiate_seconds)
        swarm.set_stream_handler(self._inbound.serve)
        swarm.register_notifee(_Notifee(self))

    @property
    def peer_id(self) -> PeerId:
        """This host's identity."""
        return self._peer_id

    def addrs(self) -> tuple[str, ...]:
        """Return the multiaddrs others can dial, each ending in ``/p2p/<peer id>``."""
        return tuple(str(addr) for addr in self.basic.get_addrs())

    def listen_addrs(self) -> tuple[str, ...]:
        """Return what we listen on, wildcards expanded, without ``/p2p/``."""
        return tuple(str(addr) for addr in self.basic.get_transport_addrs())

    def announce(self, addrs: Sequence[str]) -> None:
        """Let ``addrs()`` and identify give these instead (each without our id).

        None at all brings back what the configuration announces, or the listening ones.
        """
        chosen = addrs or self._config.announce
        self.basic.announced = tuple(Multiaddr(addr) for addr in chosen)

    def share_listener(self, take: TakeSocket) -> None:
        """Give connections that do not begin with multistream-select to ``take``."""
        self._swarm.foreign = take

    def connected(self) -> frozenset[PeerId]:
        """Return the peers with a live control connection."""
        return frozenset(
            PeerId(str(peer))
            for peer, connections in self._swarm.get_connections_map().items()
            if any(is_live(connection) for connection in connections)
        )

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """Return a new bounded channel of connection events (overflow is dropped)."""
        send, receive = trio.open_memory_channel[PeerEvent](EVENT_ROOM)
        self._listeners.append(send)
        return receive

    async def connect(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Have a live connection with ``peer``; all ``addrs`` are tried at once.

        Those through a relay start a little later, or when all others have failed.

        Raises:
            NoRoute: no address answered; the reason lists each address and its error.
            IntegrityError: something answered, but not as ``peer``.
        """
        public_key_of(peer)
        if not self.links.of(peer):
            await dial(
                self._swarm,
                peer,
                addrs[: self._config.max_dials],
                seconds=self._config.dial_seconds,
                connected=lambda: bool(self.links.of(peer)),
                circuit=lambda addr: self._dial_circuit(peer, addr),
            )

    async def _dial_circuit(self, peer: PeerId, addr: str) -> INetConn:
        relay_addr, _, target = addr.partition(CIRCUIT)
        if target not in ("", f"/p2p/{peer}"):
            raise ValueError("the circuit leads to another peer")
        if self._circuit_dialer is None:
            raise NoRoute("this peer does not use relays")
        stream, info = await self._circuit_dialer(relay_addr, peer)
        return await self.links.adopt(peer, stream, info)

    def set_circuit_dialer(self, dial: CircuitDialer) -> None:
        """Use ``dial`` for addresses that contain ``/p2p-circuit``."""
        self._circuit_dialer = dial

    async def adopt(
        self, peer: PeerId, stream: trio.abc.Stream, info: ConnectionInfo
    ) -> None:
        """Have a connection with ``peer`` over ``stream``, which the host then owns.

        Runs the security handshake (as initiator if ``info.outbound``) and the muxer.

        Raises:
            IntegrityError: the other end is not ``peer``; the stream is closed.
            Unavailable: the stream broke or took too long.
        """
        await self.links.adopt(peer, stream, info)

    def connections(self, peer: PeerId) -> tuple[ConnectionInfo, ...]:
        """Return the live connections with ``peer``, best first."""
        return tuple(self.links.info(found) for found in self.links.of(peer))

    def doubt(self, peer: PeerId | None = None) -> None:
        """Have the connections with ``peer`` (None: all) show that they are alive.

        One that does not answer within ``libp2p_pulse.DOUBT_SECONDS`` ends; until it
        answers, streams are opened on others if there are any.
        """
        for each in self.connected() if peer is None else (peer,):
            self.links.doubt(each)

    async def close_connections(self, peer: PeerId, kind: ConnectionKind) -> None:
        """Close the connections of one kind with ``peer``."""
        await self.links.close(peer, kind)

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
            with (
                libp2p_errors(f"no stream to {short(peer)}"),
                trio.fail_after(self._config.negotiate_seconds),
            ):
                return await self._negotiate(peer, stream, protocol)
        except BaseException as exc:
            reset(stream)
            if isinstance(exc, trio.TooSlowError):
                raise PeerTimeout(
                    f"{short(peer)} did not answer to {protocol}"
                ) from exc
            raise

    async def _negotiate(
        self, peer: PeerId, stream: INetStream, protocol: str
    ) -> INetStream:
        try:
            await self._client.select_one_of(
                [TProtocol(protocol)], BoundedCommunicator(stream), _NEVER_SECONDS
            )
        except MultiselectClientError as exc:
            if stream.muxed_conn.is_closed:
                raise Unavailable(f"{short(peer)} left: {exc}") from exc
            raise RemoteRefused(
                f"{short(peer)} does not serve {protocol} to us",
                code="E_PROTOCOL_REFUSED",
                next_step=f"check that {short(peer)} has admitted this peer",
            ) from exc
        stream.set_protocol(TProtocol(protocol))
        return stream

    async def _raw_stream(self, peer: PeerId) -> INetStream:
        broken = None
        for connection in self.links.of(peer):  # the best first
            try:
                with libp2p_errors(f"no stream to {short(peer)}"):
                    return await connection.new_stream()
            except Unavailable as exc:
                broken = exc  # a second connection may still work
        raise broken or Unavailable(
            f"not connected with {short(peer)}", code="E_NOT_CONNECTED"
        )

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol``, ours or libp2p's.

        The Gate is asked before the handler runs; a refusal resets the stream.
        """
        if not protocol.startswith("/"):
            raise ValueError(f"{protocol!r} does not start with '/'")
        self._inbound.gate(protocol)

        async def serve(stream: INetStream) -> None:
            peer = PeerId(str(stream.muxed_conn.peer_id))
            adapter = Libp2pStream(stream)
            await handler(peer, adapter)
            await adapter.aclose()

        self.basic.set_stream_handler(TProtocol(protocol), serve)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every control connection with ``peer``."""
        with libp2p_errors(f"closing the connection with {short(peer)}"):
            await self._swarm.close_peer(ID.from_base58(peer))

    def channel_binding(self, peer: PeerId, stream: trio.abc.Stream) -> bytes:
        """Return 32 bytes that only the ends of the connection under ``stream`` share.

        The Noise handshake hash, or the TLS exporter's.
        """
        if not isinstance(stream, Libp2pStream) or stream.peer != peer:
            raise LocalProtocolError("the stream is not one of this host with the peer")
        return stream.channel_binding

    # connection events

    def note_connected(self, peer: PeerId) -> None:
        """Tell listeners of the first connection with ``peer``.

        A peer that connects once more may have lost the others, which say nothing.
        """
        if peer not in self._live:
            self._live.add(peer)
            self._publish(PeerConnected(peer))
        else:
            self.links.doubt(peer, newest=1)
            self._publish(PeerReconnected(peer))

    def note_disconnected(self, peer: PeerId, reason: str) -> None:
        """Tell listeners when the last connection with ``peer`` is gone."""
        if peer in self._live and not self.links.of(peer):
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


@asynccontextmanager
async def open_host(
    config: HostConfig, signer: Ed25519Signer, gate: Gate, counters: Counters
) -> AsyncIterator[Libp2pHost]:
    """Run a host; inside the block it listens, on exit all its connections are closed.

    Raises:
        ConfigError: a listening address is malformed or taken.
    """
    listen, tcp = await bind(config.listen)
    basic, swarm = build(config, signer.seed, tcp, counters)
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
