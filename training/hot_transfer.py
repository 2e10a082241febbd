"""A kept state from one daemon to another over a bulk connection. Blocking."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fabric.core.digest import BLOCK_BYTES, digest
from fabric.core.errors import IntegrityError, RemoteProtocolError, Unavailable
from fabric.core.ids import PeerId
from fabric.net.paths_api import BulkHandler, BulkSocket
from training.hot_messages import LENGTH, LIST_BLOCK, REQUEST
from training.hot_store import HotStore

WINDOW = 4
"""Blocks asked ahead of their answers."""
MAX_LIST_BYTES = 1 << 25
"""Block digests of a state of 1 TiB."""


def serve_hot(store: HotStore) -> BulkHandler:
    """Return the handler of the ``hot`` bulk service over ``store``."""

    def serve(sock: BulkSocket, peer: PeerId) -> None:
        try:
            _serve(sock, store)
        except OSError:
            return  # the peer left
        finally:
            sock.close()

    return serve


def _serve(sock: BulkSocket, store: HotStore) -> None:
    request = memoryview(bytearray(REQUEST.size))
    while _fill(sock, request):
        name, index = REQUEST.unpack(request)
        block = _block(store, name.hex(), index)
        sock.sendall(LENGTH.pack(len(block)))
        sock.sendall(block)


def _block(store: HotStore, name: str, index: int) -> bytes:
    if index == LIST_BLOCK:
        return store.listing(name)
    state = store.find(name)
    if state is None:
        return b""
    try:
        with store.open(state) as file:
            return os.pread(file.fileno(), BLOCK_BYTES, index * BLOCK_BYTES)
    except Unavailable:
        return b""


def pull(sock: BulkSocket, name: str, size: int, fd: int) -> None:
    """Write the state called ``name`` into the file ``fd``; closes the socket.

    Raises:
        Unavailable: the peer is gone, or does not keep it any more.
        IntegrityError: a block is not what the name stands for.
        RemoteProtocolError: an answer of the wrong length.
    """
    try:
        raw = bytes.fromhex(name)
        sock.sendall(REQUEST.pack(raw, LIST_BLOCK))
        digests = _answer(sock, MAX_LIST_BYTES)
        if digest(digests) != raw:
            raise IntegrityError(f"another list than that of state {name[:12]}")
        num_blocks = -(-size // BLOCK_BYTES)
        if len(digests) != 32 * num_blocks:
            raise IntegrityError(f"state {name[:12]} is not of {size} B")
        for index, block in enumerate(_blocks(sock, raw, num_blocks)):
            if digest(block) != digests[32 * index : 32 * index + 32]:
                raise IntegrityError(f"block {index} of state {name[:12]} is damaged")
            os.pwrite(fd, block, index * BLOCK_BYTES)
    except OSError as exc:
        raise Unavailable(f"the peer that keeps the state is gone: {exc}") from exc
    finally:
        sock.close()


def _blocks(sock: BulkSocket, name: bytes, count: int) -> Iterator[bytes]:
    for index in range(min(WINDOW, count)):
        sock.sendall(REQUEST.pack(name, index))
    for index in range(count):
        yield _answer(sock, BLOCK_BYTES)
        if index + WINDOW < count:
            sock.sendall(REQUEST.pack(name, index + WINDOW))


def _answer(sock: BulkSocket, most: int) -> bytes:
    header = memoryview(bytearray(LENGTH.size))
    if not _fill(sock, header):
        raise Unavailable("the peer that keeps the state closed the connection")
    (size,) = LENGTH.unpack(header)
    if size == 0:
        raise Unavailable("the peer does not keep that state any more")
    if size > most:
        raise RemoteProtocolError(f"an answer of {size} B > {most} B")
    data = bytearray(size)
    if not _fill(sock, memoryview(data)):
        raise Unavailable("the peer that keeps the state closed the connection")
    return bytes(data)


def _fill(sock: BulkSocket, view: memoryview) -> bool:
    while view:
        got = sock.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True
