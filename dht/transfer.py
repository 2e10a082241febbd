"""Both ends of a content bulk connection. Blocking: each has a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto

from dht.blobs import BlobStore
from dht.export import BlobReader
from dht.messages import LENGTH, REQUEST
from dht.partial import PartialBlob
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.ids import BlobId, PeerId
from fabric.net.paths_api import BulkHandler, BulkSocket


class Outcome(Enum):
    """What came back for one requested block."""

    GOOD = auto()
    BAD = auto()
    MISSING = auto()


class ContentLink:
    """The asking end: requests go ahead, answers come in order.

    One thread at a time may call :meth:`exchange`.

    Args:
        sock: Owned by the link from here on.
        partial: Where good blocks are written.
    """

    def __init__(self, sock: BulkSocket, partial: PartialBlob) -> None:
        self._sock = sock
        self._partial = partial
        self._root = bytes.fromhex(partial.root)
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._header = memoryview(bytearray(LENGTH.size))
        self._waiting: deque[int] = deque()
        self._lock = threading.Lock()
        self._busy = False
        self._closing = False

    @property
    def waiting(self) -> int:
        """Requests not answered yet."""
        return len(self._waiting)

    def exchange(self, blocks: Sequence[int]) -> tuple[int, Outcome]:
        """Ask for ``blocks``, then receive, verify and keep the oldest answer.

        Raises:
            Unavailable: the peer is gone.
            RemoteProtocolError: the answer is not as long as the block.
            ResourceExhausted: the disk is full.
        """
        self._enter()
        try:
            if blocks:
                self._waiting.extend(blocks)
                asks = (REQUEST.pack(self._root, block) for block in blocks)
                self._sock.sendall(b"".join(asks))
            return self._receive(self._waiting.popleft())
        except OSError as exc:
            raise Unavailable(f"content connection broke: {exc}") from exc
        finally:
            self._leave()

    def close(self) -> None:
        """Close the socket, or wake the thread inside :meth:`exchange` to close it.

        A descriptor is never closed under a thread that reads it: its number may be
        another connection's a moment later.
        """
        with self._lock:
            self._closing = True
            if not self._busy:
                self._sock.close()
            elif isinstance(self._sock, socket.socket):
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def _enter(self) -> None:
        with self._lock:
            if self._closing:
                raise Unavailable("the download ended")
            self._busy = True

    def _leave(self) -> None:
        with self._lock:
            self._busy = False
            if self._closing:
                self._sock.close()

    def _receive(self, block: int) -> tuple[int, Outcome]:
        if not _fill(self._sock, self._header):
            raise Unavailable("the peer closed the content connection")
        (size,) = LENGTH.unpack(self._header)
        if size == 0:
            return block, Outcome.MISSING
        wanted = self._partial.manifest.block_bytes(block)
        if size != wanted:
            raise RemoteProtocolError(f"block of {size} B, not {wanted} B")
        data = self._buffer[:size]
        if not _fill(self._sock, data):
            raise Unavailable("the peer closed the content connection")
        good = self._partial.write_block(block, data)
        return block, Outcome.GOOD if good else Outcome.BAD


def serve_content(blobs: BlobStore) -> BulkHandler:
    """Return the handler of the ``content`` bulk service over ``blobs``."""

    def serve(sock: BulkSocket, peer: PeerId) -> None:
        try:
            _serve(sock, blobs)
        except OSError:
            return  # the peer left; it asks again if it cares
        finally:
            sock.close()

    return serve


def _serve(sock: BulkSocket, blobs: BlobStore) -> None:
    request = memoryview(bytearray(REQUEST.size))
    if not _fill(sock, request):
        return
    root, block = REQUEST.unpack(request)
    # A connection serves one blob: the asker opens one for each download.
    try:
        with blobs.open_reader(BlobId(root.hex())) as reader:
            _serve_blob(sock, reader, request, root, block)
    except Unavailable:
        sock.sendall(LENGTH.pack(0))


def _serve_blob(
    sock: BulkSocket, reader: BlobReader, request: memoryview, root: bytes, block: int
) -> None:
    answer = memoryview(bytearray(LENGTH.size + BLOCK_BYTES))
    wanted = root
    while True:
        size = 0
        if wanted == root:
            size = reader.read_into(block, answer[LENGTH.size :])
        LENGTH.pack_into(answer, 0, size)
        sock.sendall(answer[: LENGTH.size + size])
        if not _fill(sock, request):
            return
        wanted, block = REQUEST.unpack(request)


def _fill(sock: BulkSocket, view: memoryview) -> bool:
    """Receive until ``view`` is full; return False if the stream ended before."""
    while view:
        got = sock.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True
