"""Peers that are processes of their own and can be killed: stores, content, copies.

Everything is real but the network, whose place sockets of the file system take, and the
heads, which are one file. A process is forked for each start, so one costs little.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
from pathlib import Path

import msgspec
import trio

from checkpoints.mesh.config import ReplicationConfig
from checkpoints.mesh.placement import Domain
from checkpoints.mesh.replication_service import Replication, ReplicationPorts
from crdt_store.views import CheckpointHead, Heads
from dht.blobs import BlobStore
from dht.config import ContentConfig
from dht.disk import write_durably
from dht.service import open_content
from fabric.core.errors import FabricError, RemoteRefused, Unavailable
from fabric.core.ids import PeerId
from fabric.core.telemetry import Counters
from fabric.net.ports import ALLOWED

QUICK = ReplicationConfig(
    period_seconds=0.05,
    lost_after_seconds=0.4,
    retry_seconds=0.2,
    call_timeout_seconds=2,
)
CONTENT = ContentConfig(
    source_retry_seconds=0.01,
    source_retry_max_seconds=0.05,
    holders_wait_seconds=0.2,
    block_timeout_seconds=1.0,
    call_timeout_seconds=2.0,
)
_LENGTH = struct.Struct(">I")
_HEADS = msgspec.msgpack.Decoder(dict[str, dict[int, CheckpointHead]])


class FileHeads(Heads):
    """Heads in a file that every process reads."""

    def __init__(self, path: Path, peer: str) -> None:
        self._path, self._me = path, peer

    def _read(self):
        return _HEADS.decode(self._path.read_bytes()) if self._path.exists() else {}

    def runs(self):
        return sorted(self._read())

    def all(self, run, authors=None):
        return self._read().get(run, {})

    def add(self, run, step, head):
        known = self._read()
        known.setdefault(run, {})[step] = head
        write_durably(self._path, msgspec.msgpack.encode(known))

    def watch(self):
        return self

    async def changed(self):
        before = self._read()
        while self._read() == before:  # noqa: ASYNC110 - a file
            await trio.sleep(0.01)


class Station:
    """Rpc, BulkPaths, Gate and ContentRouting of one process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.own = folder, PeerId(name)
        self.handlers, self.bulk = {}, {}

    def register_async(self, method, handler):
        self.handlers[method] = handler

    async def call(self, peer, method, request):
        try:
            stream = await trio.open_unix_socket(str(self.folder / f"{peer}.rpc"))
            async with stream:
                await _send(stream, msgspec.msgpack.encode((method, self.own, request)))
                ok, data = msgspec.msgpack.decode(await _receive(stream))
        except (OSError, trio.BrokenResourceError, EOFError) as exc:
            raise Unavailable(f"no route to {peer}") from exc
        if not ok:
            raise RemoteRefused(data.decode())
        return data

    async def answer(self, stream):
        with contextlib.suppress(OSError, trio.BrokenResourceError, EOFError):
            async with stream:
                raw = await _receive(stream)
                method, sender, request = msgspec.msgpack.decode(raw)
                try:
                    reply = (True, await self.handlers[method](sender, request))
                except (FabricError, KeyError) as exc:
                    reply = (False, str(exc).encode())
                await _send(stream, msgspec.msgpack.encode(reply))

    async def dial_bulk(self, peer, service):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self.folder / f"{peer}.bulk"))
        except OSError as exc:
            sock.close()
            raise Unavailable(f"no route to {peer}") from exc
        sock.sendall(f"{service} {self.own}".ljust(64).encode())
        return sock

    def serve_bulk(self, service, handler):
        self.bulk[service] = handler

    async def answer_bulk(self, listener):
        while True:
            stream, _ = await listener.accept()
            self.nursery.start_soon(self._serve, stream)

    async def _serve(self, stream):
        name, peer = (await stream.recv(64)).decode().split()
        sock = socket.socket(fileno=os.dup(stream.fileno()))
        stream.close()
        sock.setblocking(True)
        await trio.to_thread.run_sync(
            self.bulk[name], sock, PeerId(peer), abandon_on_cancel=True
        )

    def connected(self):
        return frozenset()

    def allows(self, peer, protocol):
        return ALLOWED

    async def provide(self, key):
        await trio.lowlevel.checkpoint()
        return 1

    async def find_providers(self, key, limit):
        await trio.lowlevel.checkpoint()
        return ()


async def _send(stream, data):
    await stream.send_all(_LENGTH.pack(len(data)) + data)


async def _receive(stream):
    async def exactly(count):
        data = b""
        while len(data) < count:
            more = await stream.receive_some(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    (length,) = _LENGTH.unpack(await exactly(_LENGTH.size))
    return await exactly(length)


async def serve(folder: Path, name: str, names: str) -> None:
    """Be the peer ``name`` until killed."""
    station = Station(folder, name)
    sockets = {}
    for kind in ("rpc", "bulk"):
        path = folder / f"{name}.{kind}"
        path.unlink(missing_ok=True)
        sockets[kind] = trio.socket.socket(trio.socket.AF_UNIX)
        await sockets[kind].bind(str(path))
        sockets[kind].listen(64)
    blobs = BlobStore(folder / name, 1 << 30)
    domains = {PeerId(n): Domain(f"site {n}", f"host {n}") for n in names}
    async with trio.open_nursery() as nursery:
        station.nursery = nursery
        rng = random.Random(name)
        counters = Counters()
        async with open_content(
            CONTENT, blobs, station, station, station, station, counters,
            own=station.own, rng=rng,
        ) as content:  # fmt: skip
            ports = ReplicationPorts(
                station,
                FileHeads(folder / "heads", name),
                blobs,
                content,
                lambda: domains,
                frozenset,
            )
            replication = Replication(QUICK, station.own, ports, counters)
            await nursery.start(replication.run)
            nursery.start_soon(station.answer_bulk, sockets["bulk"])
            listener = trio.SocketListener(sockets["rpc"])
            await trio.serve_listeners(station.answer, [listener])


class Process:
    """A peer's process."""

    def __init__(self, folder: Path, name: str, names: str) -> None:
        self.name = name
        self.pid = os.fork()
        if self.pid == 0:
            try:
                trio.run(serve, folder, name, names)
            finally:
                os._exit(1)

    def kill(self) -> None:
        """Kill it; nothing of it runs on."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
