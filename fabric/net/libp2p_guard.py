"""What py-libp2p leaves open to strangers: places, lengths, and connections that ended.

Its swarm keeps an inbound connection's place until the swarm itself ends, so that a
peer is deaf after ``max_connections`` of them; half-open connections take places of
authenticated ones; and a multistream message may claim any length.
"""

from __future__ import annotations

import socket
from typing import Any

import trio
from libp2p.abc import IMuxedConn, INetConn, IRawConnection
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.io.utils import read_exactly
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.utils.varint import decode_uvarint_from_stream
from multiaddr import Multiaddr

from fabric.core.errors import ResourceExhausted
from fabric.core.telemetry import DROPPED, Counters
from fabric.net.host import TakeSocket
from fabric.net.offers import MULTISTREAM_BYTE
from fabric.net.waiting_room import WaitingRoom

MAX_HALF_OPEN = 128
"""Inbound connections that have not authenticated."""
MAX_NAME_BYTES = 1024
"""One multistream message: a protocol id with its newline."""
MAX_READ_BYTES = 256 * 1024
"""Nobody asks for more at once, except for a message that lies about its length."""


def check_read(n: int | None) -> None:
    """Refuse to wait for ``n`` bytes that nobody means to send.

    Raises:
        ConnectionClosedError: as if the connection had ended, which it then does.
    """
    if n is not None and n > MAX_READ_BYTES:
        raise ConnectionClosedError(f"a message of {n} B > {MAX_READ_BYTES} B")


class BoundedCommunicator(MultiselectCommunicator):  # type: ignore[misc]  # untyped
    """Multistream-select messages of at most :data:`MAX_NAME_BYTES`."""

    async def read(self) -> str:
        """Return the next message.

        Raises:
            MultiselectCommunicatorError: it is malformed or the stream ended.
        """
        try:
            length = await decode_uvarint_from_stream(self.read_writer)
            if not 0 < length <= MAX_NAME_BYTES:
                raise MultiselectCommunicatorError(f"a message of {length} B")
            data = await read_exactly(self.read_writer, length)
            text = data.decode()
        except (IOException, ValueError) as exc:
            raise MultiselectCommunicatorError("malformed negotiation") from exc
        if not text.endswith("\n"):
            raise MultiselectCommunicatorError("a message without its newline")
        return str(text[:-1])


async def is_foreign(sock: trio.socket.SocketType) -> bool:
    """Return whether what arrives is not multistream-select; it stays unread.

    Waits for the first byte. A connection that ends before is not foreign: whoever
    reads it learns that it ended.
    """
    try:
        first = await sock.recv(1, socket.MSG_PEEK)
    except OSError:
        return False
    return bool(first) and first[0] != MULTISTREAM_BYTE


class FabricSwarm(Swarm):  # type: ignore[misc]  # untyped library
    """A swarm whose inbound places are freed when their connections end.

    Attributes:
        counters: Where connections are counted that found no place.
        foreign: Takes connections that do not begin with multistream-select.
    """

    counters: Counters
    foreign: TakeSocket | None = None

    def __init__(self, *args: Any, counters: Counters, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **settings)
        self.counters = counters
        self._room = WaitingRoom(MAX_HALF_OPEN)
        # half-open connections have places of their own, beside max_connections
        self._inbound_limiter.total_tokens += MAX_HALF_OPEN

    async def upgrade_inbound_raw_conn(
        self, raw_conn: IRawConnection, maddr: Multiaddr
    ) -> IMuxedConn:
        """Authenticate an inbound connection and stay until it has ended.

        Raises:
            SwarmException: always, at the latest when the connection ended: py-libp2p
                waits for the swarm's end when this returns, and would hold the place.
        """
        remote = raw_conn.get_remote_address()
        try:
            with self._room.place(remote[0] if remote else ""):
                await self._give_away_foreign(raw_conn)
                muxer = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        except ResourceExhausted as exc:
            self.counters.add(DROPPED, label="half_open_connections")
            raise SwarmException(exc.reason) from exc
        await muxer.ended.wait()
        raise SwarmException("the connection ended")

    async def _give_away_foreign(self, raw_conn: IRawConnection) -> None:
        """Let ``foreign`` have what does not speak our protocol.

        Raises:
            SwarmException: it was given away, or said nothing in time.
        """
        stream = getattr(raw_conn, "stream", None)
        if self.foreign is None or not isinstance(stream, TrioTCPStream):
            return
        with trio.move_on_after(self.connection_config.inbound_upgrade_timeout) as wait:
            if await is_foreign(stream.stream.socket):
                self.foreign(socket.socket(fileno=stream.stream.socket.detach()))
                raise SwarmException("the connection is for the data plane")
        if wait.cancelled_caught:
            raise SwarmException("the connection said nothing")

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "") -> INetConn:
        """Keep an authenticated connection; its place is for the next."""
        self._room.settle()
        return await super().add_conn(muxed_conn, direction)
