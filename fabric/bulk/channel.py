"""Frames over a blocking socket, one way: how workers exchange tensors.

    kind: 1 B | meta length: 4 B | payload length: 8 B | meta | payload

Big-endian. ``meta`` is small and structured (msgpack of the caller), ``payload`` is raw
bytes that go from the sender's buffer to the receiver's without a copy of ours. A pair
that sends both ways opens two sockets: a TLS socket belongs to one thread at a time.
"""

from __future__ import annotations

import struct
from typing import Protocol

import msgspec

from fabric.bulk.tls import tls_errors
from fabric.core.errors import LocalProtocolError, RemoteProtocolError, Unavailable

Buffer = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20
"""1 MiB per call: large enough that the GIL is released most of the time."""
MAX_META_BYTES = 1 << 16
"""Meta describes one payload; 64 KiB is a shape and a name many times over."""
DEFAULT_STALL_SECONDS = 60.0
"""A peer that does not move 1 MiB in this time is gone."""
_JOIN_BYTES = 1 << 14
_HEADER = struct.Struct(">BIQ")


class ByteSocket(Protocol):
    """What a channel needs: a plain, TLS or counting socket."""

    def sendall(self, data: Buffer, /) -> None:
        """Send all of ``data``."""
        ...

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0, /) -> int:
        """Receive up to ``nbytes`` (0: all that fits) into ``buffer``."""
        ...

    def settimeout(self, value: float | None, /) -> None:
        """Bound each later call, in seconds."""
        ...

    def close(self) -> None:
        """Close the socket."""
        ...


class Frame(msgspec.Struct, frozen=True):
    """One received frame; ``payload`` is the receiver's buffer."""

    kind: int
    meta: bytes
    payload: bytearray


class FrameHead(msgspec.Struct, frozen=True):
    """A frame whose payload is still on the wire."""

    kind: int
    meta: bytes
    payload_bytes: int


class BulkSender:
    """Sends frames; one thread at a time.

    Args:
        sock: Connected and authenticated; closed by :meth:`close`.
        stall_seconds: Longest time in which 1 MiB must leave.
    """

    def __init__(
        self, sock: ByteSocket, *, stall_seconds: float = DEFAULT_STALL_SECONDS
    ) -> None:
        sock.settimeout(stall_seconds)
        self._sock = sock

    def send(self, kind: int, meta: bytes = b"", payload: Buffer = b"") -> None:
        """Send one frame; ``payload`` may be reused when this returns.

        Raises:
            Unavailable: the peer is gone, or stalls (PeerTimeout). The channel is then
                unusable: close it.
        """
        if len(meta) > MAX_META_BYTES:
            raise ValueError(f"meta of {len(meta)} B > {MAX_META_BYTES} B")
        view = memoryview(payload).cast("B")
        head = _HEADER.pack(kind, len(meta), len(view)) + meta
        with tls_errors():
            if len(view) <= _JOIN_BYTES:
                self._sock.sendall(head + view)
                return
            self._sock.sendall(head)
            for at in range(0, len(view), CHUNK_BYTES):
                self._sock.sendall(view[at : at + CHUNK_BYTES])

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


class BulkReceiver:
    """Receives frames; one thread at a time.

    Args:
        sock: Connected and authenticated; closed by :meth:`close`.
        max_payload: Largest payload accepted, in bytes: checked when it is announced,
            before anything is allocated.
        stall_seconds: Longest silence of the peer; None waits for ever.
    """

    def __init__(
        self,
        sock: ByteSocket,
        max_payload: int,
        *,
        stall_seconds: float | None = DEFAULT_STALL_SECONDS,
    ) -> None:
        sock.settimeout(stall_seconds)
        self._sock = sock
        self._max_payload = max_payload
        self._pending = 0

    def receive(self) -> Frame:
        """Return the next frame, its payload in a buffer of its own.

        Raises:
            RemoteProtocolError: the peer announced more than is accepted.
            Unavailable: the peer closed, is gone, or stalls (PeerTimeout).
        """
        head = self.receive_head()
        payload = bytearray(head.payload_bytes)
        self.receive_payload(payload)
        return Frame(head.kind, head.meta, payload)

    def receive_head(self) -> FrameHead:
        """Return the next frame's kind and meta; :meth:`receive_payload` must follow.

        Raises:
            RemoteProtocolError: the peer announced more than is accepted.
            Unavailable: the peer closed, is gone, or stalls (PeerTimeout).
        """
        if self._pending:
            raise LocalProtocolError(f"payload of {self._pending} B was not received")
        kind, meta_bytes, payload_bytes = _HEADER.unpack(self._exactly(_HEADER.size))
        if meta_bytes > MAX_META_BYTES:
            raise RemoteProtocolError(f"meta of {meta_bytes} B > {MAX_META_BYTES} B")
        if payload_bytes > self._max_payload:
            raise RemoteProtocolError(
                f"payload of {payload_bytes} B > {self._max_payload} B"
            )
        meta = self._exactly(meta_bytes)
        self._pending = payload_bytes
        return FrameHead(kind, bytes(meta), payload_bytes)

    def receive_payload(self, into: bytearray | memoryview) -> None:
        """Fill ``into`` with the announced payload, whose size it must have.

        Raises:
            Unavailable: the peer closed, is gone, or stalls (PeerTimeout).
        """
        view = memoryview(into).cast("B")
        if len(view) != self._pending:
            raise LocalProtocolError(
                f"buffer of {len(view)} B for a payload of {self._pending} B"
            )
        self._fill(view)
        self._pending = 0

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _exactly(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self._fill(memoryview(buffer))
        return buffer

    def _fill(self, view: memoryview) -> None:
        at = 0
        with tls_errors():
            while at < len(view):
                received = self._sock.recv_into(view[at : at + CHUNK_BYTES])
                if not received:
                    raise Unavailable("peer closed the channel")
                at += received
