"""How many bytes a connection moved, counted by the kernel where it can."""

from __future__ import annotations

import socket
import struct
import sys

import msgspec

from fabric.bulk.channel import Buffer, ByteSocket

# struct tcp_info (linux/tcp.h): u64 bytes_acked at 120, u64 bytes_received at 128.
_TCP_INFO_BYTES = struct.Struct("=120xQQ")


class LinkBytes(msgspec.Struct, frozen=True):
    """Bytes on the wire above TCP: TLS records included, retransmissions not."""

    sent: int
    received: int

    def __add__(self, other: LinkBytes) -> LinkBytes:
        return LinkBytes(self.sent + other.sent, self.received + other.received)


class CountingSocket:
    """A socket that counts what passes through it: for Unix sockets."""

    def __init__(self, sock: ByteSocket) -> None:
        self._sock = sock
        self._sent = 0
        self._received = 0

    def sendall(self, data: Buffer, /) -> None:
        """Send all of ``data``; counted when it returns."""
        self._sock.sendall(data)
        self._sent += memoryview(data).nbytes

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0, /) -> int:
        """Receive into ``buffer``."""
        received = self._sock.recv_into(buffer, nbytes)
        self._received += received
        return received

    def settimeout(self, value: float | None, /) -> None:
        """Bound each later call, in seconds."""
        self._sock.settimeout(value)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def link_bytes(self) -> LinkBytes:
        """Return the bytes passed so far."""
        return LinkBytes(self._sent, self._received)


def kernel_counts(sock: socket.socket) -> bool:
    """Return whether :func:`link_bytes` can ask the kernel about ``sock``."""
    return sys.platform == "linux" and sock.family in (socket.AF_INET, socket.AF_INET6)


def link_bytes(sock: socket.socket | CountingSocket) -> LinkBytes:
    """Return the bytes that the peer of ``sock`` acknowledged and sent us.

    Raises:
        ValueError: the kernel does not count for this socket: wrap it in a
            :class:`CountingSocket`.
        OSError: the socket is closed.
    """
    if isinstance(sock, CountingSocket):
        return sock.link_bytes()
    if not kernel_counts(sock):
        raise ValueError(f"no kernel counters for a socket of {sock.family.name}")
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES.size)
    sent, received = _TCP_INFO_BYTES.unpack(info)
    return LinkBytes(sent, received)
