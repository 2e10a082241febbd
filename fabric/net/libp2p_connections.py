"""Which connections there are with a peer, how each came about, and which is best.

A connection that py-libp2p dialled or accepted is "direct". One that traversal brought
(:func:`Connections.adopt`) carries what traversal says about it.
"""

from __future__ import annotations

import weakref

import trio
from libp2p.abc import INetConn, IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from fabric.core.errors import IntegrityError, PeerTimeout
from fabric.core.ids import PeerId, public_key_of, short
from fabric.net.libp2p_dialer import is_mismatch
from fabric.net.libp2p_errors import libp2p_errors
from fabric.net.libp2p_guard import check_read
from fabric.net.libp2p_muxer import FabricMuxer
from fabric.net.offers import format_address
from fabric.net.traversal_api import ConnectionInfo, ConnectionKind


class StreamConnection(IRawConnection):
    """Any trio stream as what py-libp2p secures."""

    def __init__(self, stream: trio.abc.Stream, info: ConnectionInfo) -> None:
        self.info = info
        self.is_initiator = info.outbound
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        """Return what has arrived, at most ``n`` bytes; b"" at the end.

        Raises:
            ConnectionClosedError: the stream broke.
        """
        check_read(n)
        if n == 0:
            return b""
        try:
            return bytes(await self._stream.receive_some(n))
        except trio.BrokenResourceError as exc:
            raise ConnectionClosedError(str(exc) or "the stream broke") from exc
        except trio.ClosedResourceError:
            return b""  # we closed it ourselves: an orderly end

    async def write(self, data: bytes) -> None:
        """Send ``data``.

        Raises:
            ConnectionClosedError: the stream broke or was closed.
        """
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectionClosedError(str(exc) or "the stream broke") from exc

    async def close(self) -> None:
        """Close the stream."""
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the other end of the socket, or None on a relay."""
        ip, _, port = self.info.remote.rpartition(":")
        return (ip.strip("[]"), int(port)) if ip and port.isdigit() else None

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return nothing: addresses of adopted streams are no one's to dial."""
        return []

    def get_connection_type(self) -> ConnectionType:
        """Return whether a relay carries the stream."""
        relayed = self.info.kind == "relay"
        return ConnectionType.RELAYED if relayed else ConnectionType.DIRECT


class Connections:
    """The live connections of a swarm, by peer, best first.

    Args:
        swarm: Keeps them.
        upgrade_seconds: An adopted stream must authenticate within this.
    """

    def __init__(self, swarm: Swarm, upgrade_seconds: float) -> None:
        self._swarm = swarm
        self._upgrade_seconds = upgrade_seconds
        self._infos: weakref.WeakKeyDictionary[FabricMuxer, ConnectionInfo] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, peer: PeerId) -> list[INetConn]:
        """Return the live connections with ``peer``, best first.

        Those that may be dead are last, before them the relayed, each newest first.
        """
        found = self._swarm.get_connections(ID.from_base58(peer))
        newest_first = [conn for conn in reversed(found) if is_live(conn)]
        return sorted(
            newest_first,
            key=lambda c: (c.muxed_conn.pulse.in_doubt, self.info(c).kind == "relay"),
        )

    def doubt(self, peer: PeerId, newest: int = 0) -> None:
        """Have the connections with ``peer`` but the newest show that they are alive.

        Args:
            peer: Who.
            newest: How many of the newest are spared.
        """
        found = self._swarm.get_connections(ID.from_base58(peer))
        for connection in found[: len(found) - newest]:
            connection.muxed_conn.pulse.doubt()

    def info(self, connection: INetConn) -> ConnectionInfo:
        """Return how ``connection`` came about."""
        muxer: FabricMuxer = connection.muxed_conn
        known = self._infos.get(muxer)
        if known is None:
            known = self._infos[muxer] = _info_of_socket(muxer)
        return known

    async def close(self, peer: PeerId, kind: ConnectionKind) -> None:
        """Close the connections of one kind with ``peer``."""
        for connection in self.of(peer):
            if self.info(connection).kind == kind:
                await connection.close()

    async def adopt(
        self, peer: PeerId, stream: trio.abc.Stream, info: ConnectionInfo
    ) -> INetConn:
        """Return a connection with ``peer`` over ``stream``, which is owned from now.

        Raises:
            IntegrityError: the other end is not ``peer``.
            Unavailable: the stream broke or took too long, or we have too many.
        """
        try:
            public_key_of(peer)
            with trio.fail_after(self._upgrade_seconds):
                return await self._upgrade(peer, stream, info)
        except BaseException as exc:
            await trio.aclose_forcefully(stream)
            if isinstance(exc, trio.TooSlowError):
                raise PeerTimeout(
                    f"{short(peer)} did not authenticate over a {info.kind} stream "
                    f"within {self._upgrade_seconds:.0f} s"
                ) from exc
            if is_mismatch(exc):
                raise _wrong_peer(peer, info) from exc
            with libp2p_errors(
                f"no connection with {short(peer)} over a {info.kind} stream"
            ):
                raise

    async def _upgrade(
        self, peer: PeerId, stream: trio.abc.Stream, info: ConnectionInfo
    ) -> INetConn:
        """Run security and muxer, and register the connection.

        Not with the swarm's own ``upgrade_inbound_raw_conn``: that registers whoever
        answers, and the one who answers must be ``peer``.
        """
        raw = StreamConnection(stream, info)
        expected = ID.from_base58(peer)
        upgrader = self._swarm.upgrader
        secured = await upgrader.upgrade_security(
            raw, info.outbound, expected if info.outbound else None
        )
        if secured.get_remote_peer() != expected:
            raise _wrong_peer(peer, info)
        muxer = await upgrader.upgrade_connection(secured, expected)
        self._infos[muxer] = info  # before its first event: listeners look it up
        direction = "outbound" if info.outbound else "inbound"
        return await self._swarm.add_conn(muxer, direction)


def is_live(connection: INetConn) -> bool:
    """Return whether streams can still be opened on ``connection``."""
    return not (connection.is_closed or connection.muxed_conn.is_closed)


def _wrong_peer(peer: PeerId, info: ConnectionInfo) -> IntegrityError:
    where = info.remote or f"relay {short(info.relay or '')}"
    return IntegrityError(
        f"{where} answered, but not as {peer}",
        code="E_WRONG_PEER",
        next_step="the address belongs to another peer now: ask for a fresh one",
    )


def _info_of_socket(muxer: FabricMuxer) -> ConnectionInfo:
    """Return the info of a connection of py-libp2p's own, from its socket."""
    part: object = muxer.secured_conn
    for name in ("_connection", "stream", "stream", "socket"):
        part = getattr(part, name, None)
    local = remote = ""
    if isinstance(part, trio.socket.SocketType):
        try:
            local = format_address(*part.getsockname()[:2])
            remote = format_address(*part.getpeername()[:2])
        except OSError:
            pass  # it broke just now
    return ConnectionInfo(
        kind="direct", outbound=muxer.is_initiator, local=local, remote=remote
    )
