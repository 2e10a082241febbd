"""Sockets between ranks that find each other on a board: TCP with TLS, or one host.

A board is anything with ``set`` and a blocking ``get``: torch's store is one. Each rank
shows an address there; who sends dials. Between processes of one host a Unix socket
goes with a piece of shared memory, elsewhere TLS with the certificates on the board:
they are worth what the board is worth, so a daemon hands over sockets itself instead
(``Connector`` is the port it fills).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
import uuid
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from fabric.bulk.certificates import Credentials
from fabric.bulk.tls import handshake
from fabric.bulk.tls_receiver import TlsReceiver
from fabric.core.codec import Codec
from fabric.core.errors import (
    FabricError,
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)
from training.worker.collectives.choose import PIECE_BYTES
from training.worker.collectives.line import Duplex, Opened

SLOTS = 4
"""Pieces in shared memory per connection: few, so that they stay in the cache."""
MEMORY_BYTES = SLOTS * PIECE_BYTES
BACKLOG = 64
HELLO_SECONDS = 10.0
"""A connection that does not say who it is in this time is closed."""
_HELLO = struct.Struct(">I16s")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Board(Protocol):
    """Where members of a group find each other."""

    def set(self, key: str, value: str, /) -> None:
        """Show ``value``."""
        ...

    def get(self, key: str, /) -> bytes:
        """Return the value of ``key``, waiting for it; bounded by the board."""
        ...


class Address(msgspec.Struct, frozen=True):
    """How a rank can be reached.

    Attributes:
        host: Equal for processes that can share memory.
        local: Abstract Unix socket.
        ip: Of the TCP socket.
        port: Of the TCP socket.
        certificate: To trust in the handshake; empty: plain TCP.
    """

    host: Annotated[str, msgspec.Meta(max_length=128)]
    local: Annotated[str, msgspec.Meta(max_length=100)]
    ip: Annotated[str, msgspec.Meta(max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    certificate: Annotated[bytes, msgspec.Meta(max_length=4096)]


ADDRESS: Codec[Address] = Codec(Address, max_bytes=8192)


class BoardConnector:
    """The connections of one rank.

    Args:
        board: Of this group alone.
        rank: Ours.
        size: Of the group.
        ip: Where we listen.
        credentials: Ours, for TLS; None: plain TCP.
        same_host: Whether to use shared memory where it can be.
        wait_seconds: Longest wait for a peer to dial.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        size: int,
        *,
        ip: str = "127.0.0.1",
        credentials: Credentials | None = None,
        same_host: bool = True,
        wait_seconds: float = 60.0,
    ) -> None:
        self._board = board
        self._rank = rank
        self._size = size
        self._credentials = credentials
        self._wait = wait_seconds
        self._arrived: dict[tuple[int, str], Opened] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._host = _host_id() if same_host else ""
        name = f"fabric-{uuid.uuid4().hex}"
        self._tcp = socket.create_server((ip, 0), backlog=BACKLOG)
        self._unix = socket.socket(socket.AF_UNIX)
        self._unix.bind("\0" + name)
        self._unix.listen(BACKLOG)
        der = credentials.der if credentials is not None else b""
        port = self._tcp.getsockname()[1]
        mine = Address(self._host, name, ip, port, der)
        board.set(f"address/{rank}", ADDRESS.encode(mine).hex())
        for listener in (self._tcp, self._unix):
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def dial(self, rank: int, channel: str) -> Opened:
        """Return a connection on which we send to ``rank``.

        Raises:
            Unavailable: it does not answer.
            IntegrityError: it is not who the board says.
        """
        address = self._address(rank)
        hello = _HELLO.pack(self._rank, channel.encode())
        try:
            if self._host and address.host == self._host:
                return _dial_local(address, hello)
            sock = socket.create_connection((address.ip, address.port), HELLO_SECONDS)
            sock.sendall(hello)
        except OSError as exc:
            raise Unavailable(f"rank {rank} does not answer: {exc}") from exc
        return Opened(self._secured(sock, address, server=False))

    def accept(self, rank: int, channel: str) -> Opened:
        """Return the connection that ``rank`` dialled.

        Raises:
            PeerTimeout: it did not.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (rank, channel) in self._arrived or self._closed, self._wait
            )
            opened = self._arrived.pop((rank, channel), None)
        if opened is None:
            raise PeerTimeout(f"rank {rank} did not connect in {self._wait:g} s")
        return opened

    def close(self) -> None:
        """Accept no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left, self._arrived = list(self._arrived.values()), {}
        for opened in left:
            opened.sock.close()
        for listener in (self._tcp, self._unix):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            listener.close()

    def _address(self, rank: int) -> Address:
        try:
            shown = self._board.get(f"address/{rank}")
        except Exception as exc:
            raise Unavailable(f"rank {rank} is not on the board: {exc}") from exc
        return _read_address_untrusted(shown)

    def _secured(
        self, sock: socket.socket, address: Address, *, server: bool
    ) -> Duplex:
        if self._credentials is None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        der = address.certificate
        if server:
            return TlsReceiver(sock, self._credentials, der, HELLO_SECONDS)
        return handshake(
            sock, self._credentials, der, server=False, timeout_seconds=HELLO_SECONDS
        )

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        """Find out who dialled; a stranger is hung up on."""
        try:
            rank, channel, opened = self._identified(sock)
        except (FabricError, OSError):
            sock.close()
            return
        with self._changed:
            if not self._closed:
                self._arrived[rank, channel] = opened
                self._changed.notify_all()
                return
        opened.sock.close()

    def _identified(self, sock: socket.socket) -> tuple[int, str, Opened]:
        sock.settimeout(HELLO_SECONDS)
        if sock.family == socket.AF_UNIX:
            _check_same_user(sock)
            data, fds, _, _ = socket.recv_fds(sock, _HELLO.size, 1)
            rank, channel = _read_hello_untrusted(data, self._size)
            memory = _mapped_untrusted(fds)
            return rank, channel, Opened(sock, memory, "local")
        hello = bytearray()
        while len(hello) < _HELLO.size:
            got = sock.recv(_HELLO.size - len(hello))
            if not got:
                raise Unavailable("closed before it said who it is")
            hello += got
        rank, channel = _read_hello_untrusted(bytes(hello), self._size)
        return (
            rank,
            channel,
            Opened(self._secured(sock, self._address(rank), server=True)),
        )


def _dial_local(address: Address, hello: bytes) -> Opened:
    fd = os.memfd_create("fabric-pieces", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, MEMORY_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(HELLO_SECONDS)
        sock.connect("\0" + address.local)
        socket.send_fds(sock, [hello], [fd])
        return Opened(sock, mmap.mmap(fd, MEMORY_BYTES), "local")
    finally:
        os.close(fd)


def _mapped_untrusted(fds: list[int]) -> mmap.mmap:
    """Map what a process of ours shares; it must not be able to take it away."""
    try:
        if len(fds) != 1 or os.fstat(fds[0]).st_size != MEMORY_BYTES:
            raise RemoteProtocolError("not the shared memory we expect")
        if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise RemoteProtocolError("shared memory that can shrink")
        return mmap.mmap(fds[0], MEMORY_BYTES)
    finally:
        for fd in fds:
            os.close(fd)


def _check_same_user(sock: socket.socket) -> None:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    if uid != os.getuid():
        raise IntegrityError(f"a process of user {uid} dialled")


def _read_address_untrusted(shown: bytes) -> Address:
    try:
        data = bytes.fromhex(shown.decode("ascii"))
    except ValueError as exc:
        raise RemoteProtocolError(f"no address: {exc}") from exc
    return ADDRESS.decode_untrusted(data)


def _read_hello_untrusted(data: bytes, size: int) -> tuple[int, str]:
    if len(data) != _HELLO.size:
        raise RemoteProtocolError(f"hello of {len(data)} B")
    rank, channel = _HELLO.unpack(data)
    if rank >= size:
        raise RemoteProtocolError(f"rank {rank} in a group of {size}")
    try:
        return rank, channel.rstrip(b"\0").decode()
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError("hello of no channel") from exc


def _host_id() -> str:
    """Return what is equal for processes that share a kernel and a network."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        return f"{boot.read_text().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    return ""


class MemoryBoard:
    """A board for the threads of one process: tests."""

    def __init__(self, wait_seconds: float = 30.0) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._wait = wait_seconds

    def set(self, key: str, value: str) -> None:
        """Show ``value``."""
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, waiting for it."""
        ends = time.monotonic() + self._wait
        with self._changed:
            while key not in self._values:
                if not self._changed.wait(max(0.0, ends - time.monotonic())):
                    raise PeerTimeout(f"nobody showed {key}")
            return self._values[key]
