"""Peers with stores on disk, joined by RPC in memory and bulk sockets of the kernel."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress

import pytest
import trio

from dht.blobs import BlobStore
from dht.config import ContentConfig
from dht.service import open_content
from fabric.core.errors import FabricError, RemoteRefused, Unavailable
from fabric.core.ids import PeerId
from fabric.core.telemetry import Counters
from fabric.net.ports import ALLOWED, Decision

FAST = ContentConfig(
    source_retry_seconds=0.01,
    source_retry_max_seconds=0.05,
    holders_wait_seconds=0.2,
    manifest_stagger_seconds=0.2,
    block_timeout_seconds=0.1,
    call_timeout_seconds=2.0,
)


class Peer:
    """Rpc, BulkPaths, Gate and ContentRouting of one peer."""

    def __init__(self, mesh, name, directory, config):
        self.mesh, self.own = mesh, PeerId(name)
        self.blobs = BlobStore(directory / name, 1 << 30)
        self.config = config
        self.counters = Counters()
        self.handlers, self.bulk = {}, {}
        self.refused = set()
        self.dialled = []
        self.content = None

    # Rpc
    def register(self, method, handler):
        raise NotImplementedError

    def register_async(self, method, handler):
        self.handlers[method] = handler

    async def call(self, peer, method, request):
        await trio.lowlevel.checkpoint()
        far = self.mesh.peers.get(peer)
        if far is None or far.handlers.get(method) is None:
            raise Unavailable(f"no route to {peer}")
        try:
            return await far.handlers[method](self.own, request)
        except FabricError as exc:
            raise RemoteRefused(exc.reason, code=exc.code) from exc

    def connected(self):
        return frozenset(self.mesh.peers)

    def lost(self):
        raise NotImplementedError

    def rtt_seconds(self, peer):
        return None

    # BulkPaths
    async def dial_bulk(self, peer, service):
        await trio.lowlevel.checkpoint()
        self.dialled.append(peer)
        far = self.mesh.peers.get(peer)
        if far is None:
            raise Unavailable(f"no route to {peer}")
        mine, theirs = socket.socketpair()
        thread = threading.Thread(
            target=far.bulk[service], args=(theirs, self.own), daemon=True
        )
        thread.start()
        self.mesh.threads.append((thread, theirs))
        return mine

    def serve_bulk(self, service, handler):
        self.bulk[service] = handler

    # Gate
    def allows(self, peer, protocol):
        return Decision(allowed=False) if peer in self.refused else ALLOWED

    # ContentRouting
    async def provide(self, key):
        await trio.lowlevel.checkpoint()
        self.mesh.records.setdefault(key, []).append((trio.current_time(), self.own))
        return len(self.mesh.peers) - 1

    async def find_providers(self, key, limit):
        await trio.lowlevel.checkpoint()
        found = dict.fromkeys(peer for _, peer in self.mesh.records.get(key, ()))
        return tuple(found)[:limit]


class Mesh:
    def __init__(self, directory, nursery):
        self.directory, self.nursery = directory, nursery
        self.peers, self.records, self.threads = {}, {}, []

    async def join(self, name, config=FAST):
        peer = Peer(self, name, self.directory, config)
        self.peers[peer.own] = peer
        peer.content = await self.nursery.start(self.run, peer)
        return peer

    async def run(self, peer, *, task_status):
        async with open_content(
            peer.config,
            peer.blobs,
            peer,
            peer,
            peer,
            peer,
            peer.counters,
            own=peer.own,
            rng=random.Random(peer.own),
        ) as content:
            task_status.started(content)
            await trio.sleep_forever()

    def close(self):
        for thread, sock in self.threads:
            with suppress(OSError):  # its handler closed it
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            assert not thread.is_alive()
            sock.close()


@pytest.fixture
async def mesh(tmp_path):
    async with trio.open_nursery() as nursery:
        mesh = Mesh(tmp_path, nursery)
        yield mesh
        mesh.close()
        nursery.cancel_scope.cancel()
