"""Connections with the other participants' workers: one thread per direction and peer.

    main thread --send()--> bounded queue --> sender thread --> socket
    socket --> receiver thread --> inbox (bounded) --> main thread

Threads only move bytes: each fact reaches the main thread through the inbox, and the
main thread alone decides. A connection ends in exactly one :class:`Lost`. A peer that
does not take what we send is lost when its queue is full, and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
from dataclasses import dataclass
from typing import Any

from fabric.bulk.certificates import Credentials
from fabric.bulk.channel import BulkReceiver, BulkSender, ByteSocket
from fabric.bulk.socket_counters import (
    CountingSocket,
    LinkBytes,
    kernel_counts,
    link_bytes,
)
from fabric.bulk.tls import handshake
from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.ids import PeerId
from training.messages import EXCHANGE, FRAME_KIND, Connect, ExchangeMeta

QUEUE_FRAMES = 16
"""Frames per sender: two contributions, and the blocks a newcomer has asked for."""
IDLE_CHECK_SECONDS = 0.5
"""How soon a sender with nothing to send notices that its peer is gone."""
NO_BYTES = LinkBytes(0, 0)


@dataclass(frozen=True)
class Opened:
    """A connection is authenticated."""

    peer: PeerId
    outgoing: bool


@dataclass(frozen=True)
class Received:
    """A frame from ``peer``."""

    peer: PeerId
    meta: ExchangeMeta
    payload: bytearray


@dataclass(frozen=True)
class Lost:
    """A connection ended; it was the one in use unless another has replaced it."""

    peer: PeerId
    outgoing: bool
    error: FabricError


ExchangeEvent = Opened | Received | Lost
Buffer = bytes | bytearray | memoryview


class _Connection:
    """One socket, one direction, one thread."""

    def __init__(self, connect: Connect, sock: socket.socket) -> None:
        self.peer = PeerId(connect.peer)
        self.outgoing = connect.outgoing
        self.queue: queue.Queue[tuple[bytes, Buffer] | None] = queue.Queue(QUEUE_FRAMES)
        self.open = False
        self.ended = False
        # A second descriptor: hanging up and counting never race with the TLS object.
        self._line = sock.dup()
        self._counting: CountingSocket | None = None
        self._final: LinkBytes | None = None
        self._lock = threading.Lock()

    def counted(self, sock: socket.socket) -> ByteSocket:
        """Return ``sock`` so that :meth:`link_bytes` knows what passes."""
        if kernel_counts(self._line):
            return sock
        self._counting = CountingSocket(sock)
        return self._counting

    def link_bytes(self) -> LinkBytes:
        """Return the bytes moved so far."""
        with self._lock:
            return self._final if self._final is not None else self._count()

    def hang_up(self) -> None:
        """Wake the thread: every call on the socket fails from now on."""
        with self._lock:
            if self._final is None:
                with contextlib.suppress(OSError):  # the peer hung up first
                    self._line.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(queue.Full):  # then a send is under way, and fails
            self.queue.put_nowait(None)

    def check_idle(self) -> None:
        """Notice that the peer hung up on a connection on which it never sends.

        Raises:
            Unavailable: there is something to read: the end of the stream.
        """
        readable, _, _ = select.select([self._line], [], [], 0)
        if readable:
            raise Unavailable("peer closed the connection")

    def closed(self) -> None:
        """Keep the last count and give the descriptor back."""
        with self._lock:
            if self._final is None:
                self._final = self._count()
                self._line.close()
        self.ended = True

    def _count(self) -> LinkBytes:
        if self._counting is not None:
            return self._counting.link_bytes()
        return link_bytes(self._line) if kernel_counts(self._line) else NO_BYTES


class Exchange:
    """All connections of one worker. Its methods belong to the main thread.

    Args:
        inbox: Where events go; a full inbox stops the receivers.
        max_payload: Largest payload accepted, in bytes.
        stall_seconds: Longest time in which 1 MiB must leave, or a handshake takes.
    """

    def __init__(
        self,
        inbox: queue.Queue[Any],
        *,
        max_payload: int,
        stall_seconds: float,
    ) -> None:
        self._inbox = inbox
        self._max_payload = max_payload
        self._stall_seconds = stall_seconds
        self._live: dict[tuple[PeerId, bool], _Connection] = {}
        self._all: list[_Connection] = []
        self._moved: dict[PeerId, LinkBytes] = {}
        self._paths: dict[PeerId, str] = {}

    def add(
        self, connect: Connect, sock: socket.socket, credentials: Credentials | None
    ) -> None:
        """Authenticate ``sock`` and use it; it replaces an older one of that direction.

        Args:
            connect: Whose, which way, and the certificate to trust.
            sock: Connected; owned by the exchange from here on.
            credentials: Ours; only a connection without certificate does without.
        """
        connection = _Connection(connect, sock)
        key = (connection.peer, connection.outgoing)
        if key in self._live:
            self._live[key].hang_up()
        self._live[key] = connection
        self._all.append(connection)
        self._paths[connection.peer] = connect.path
        threading.Thread(
            target=self._serve,
            args=(connection, connect, sock, credentials),
            name=f"exchange-{'to' if connect.outgoing else 'from'}-{connect.peer[-6:]}",
            daemon=True,
        ).start()

    def send(self, peer: PeerId, meta: ExchangeMeta, payload: Buffer = b"") -> bool:
        """Queue a frame for ``peer``; return False when there is no way to it."""
        connection = self._live.get((peer, True))
        if connection is None or not connection.open:
            return False
        try:
            connection.queue.put_nowait((EXCHANGE.encode(meta), payload))
        except queue.Full:
            connection.hang_up()
            return False
        return True

    def has(self, peer: PeerId, *, outgoing: bool) -> bool:
        """Return whether an authenticated connection stands in that direction."""
        connection = self._live.get((peer, outgoing))
        return connection is not None and connection.open

    def both_ways(self, peer: PeerId) -> bool:
        """Return whether we can ask ``peer`` and hear its answer."""
        return self.has(peer, outgoing=True) and self.has(peer, outgoing=False)

    def opened(self, event: Opened) -> None:
        """Note that the main thread has seen ``event``."""
        if connection := self._live.get((event.peer, event.outgoing)):
            connection.open = True

    def forget(self, peer: PeerId, *, outgoing: bool) -> bool:
        """Drop the connection that a Lost was about; False when it was replaced."""
        connection = self._live.get((peer, outgoing))
        if connection is None or not connection.ended:
            return False
        del self._live[peer, outgoing]
        return True

    def keep(self, peers: frozenset[PeerId]) -> None:
        """Hang up on everyone else."""
        for connection in [c for c in self._live.values() if c.peer not in peers]:
            connection.hang_up()

    def hang_up(self, peer: PeerId) -> None:
        """Hang up on ``peer``, both ways."""
        for outgoing in (True, False):
            if connection := self._live.get((peer, outgoing)):
                connection.hang_up()

    def link_bytes(self) -> dict[PeerId, LinkBytes]:
        """Return the bytes moved so far, by peer, on all its connections."""
        for connection in [c for c in self._all if c.ended]:
            self._all.remove(connection)
            self._add(self._moved, connection)
        moved = dict(self._moved)
        for connection in self._all:
            self._add(moved, connection)
        return moved

    def path(self, peer: PeerId) -> str:
        """Return the path kind of the newest connection with ``peer``."""
        return self._paths[peer]

    def close(self) -> None:
        """Hang up on everyone."""
        for connection in self._live.values():
            connection.hang_up()

    def _add(self, moved: dict[PeerId, LinkBytes], connection: _Connection) -> None:
        before = moved.get(connection.peer, NO_BYTES)
        moved[connection.peer] = before + connection.link_bytes()

    def _serve(
        self,
        connection: _Connection,
        connect: Connect,
        sock: socket.socket,
        credentials: Credentials | None,
    ) -> None:
        """Move bytes until the connection ends; the thread's whole life."""
        error: FabricError = Unavailable("connection was closed")
        plain: socket.socket = sock
        try:
            plain = self._authenticate(connect, sock, credentials)
            self._inbox.put(Opened(connection.peer, connection.outgoing))
            if connection.outgoing:
                self._send_all(connection, plain)
            else:
                self._receive_all(connection, plain)
        except FabricError as exc:
            error = exc
        finally:
            connection.closed()
            plain.close()
        self._inbox.put(Lost(connection.peer, connection.outgoing, error))

    def _authenticate(
        self, connect: Connect, sock: socket.socket, credentials: Credentials | None
    ) -> socket.socket:
        if kernel_counts(sock):  # a host that vanishes sends no FIN
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not connect.certificate:
            return sock
        if credentials is None:
            raise LocalProtocolError("a TLS connection before our own certificate")
        return handshake(
            sock,
            credentials,
            connect.certificate,
            server=not connect.outgoing,
            timeout_seconds=self._stall_seconds,
        )

    def _send_all(self, connection: _Connection, sock: socket.socket) -> None:
        counted = connection.counted(sock)
        sender = BulkSender(counted, stall_seconds=self._stall_seconds)
        while True:
            try:
                item = connection.queue.get(timeout=IDLE_CHECK_SECONDS)
            except queue.Empty:
                connection.check_idle()
                continue
            if item is None:
                return
            sender.send(FRAME_KIND, *item)

    def _receive_all(self, connection: _Connection, sock: socket.socket) -> None:
        # Silence is normal between rounds: no deadline; keep-alive finds dead hosts.
        receiver = BulkReceiver(
            connection.counted(sock), self._max_payload, stall_seconds=None
        )
        while True:
            frame = receiver.receive()
            if frame.kind != FRAME_KIND:
                raise RemoteProtocolError(f"frame of kind {frame.kind}")
            meta = EXCHANGE.decode_untrusted(frame.meta)
            self._inbox.put(Received(connection.peer, meta, frame.payload))
