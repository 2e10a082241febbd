"""The trio shell of content: announce it, find it, fetch it, serve it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

import trio

from dht import bitmap
from dht.blobs import BlobStore
from dht.config import ContentConfig
from dht.download_service import ContentNet, Download, Search
from dht.manifest import BlobManifest, decode_manifest_untrusted
from dht.manifest_service import HoldersAway, fetch_manifest
from dht.messages import (
    BULK_SERVICE,
    CODEC,
    METHOD_HAVE,
    METHOD_MANIFEST,
    Ask,
    Have,
    Manifest,
    Message,
    NotHere,
)
from dht.part_service import PartialContent, blocks_bytes
from dht.partial import PartialBlob
from dht.progress import Progress
from dht.providers import MAX_PROVIDERS, Announcements, usable_providers
from dht.swarm import Swarm
from dht.transfer import serve_content
from fabric.core.errors import RemoteProtocolError, RemoteRefused, Unavailable
from fabric.core.ids import BlobId, PeerId
from fabric.core.telemetry import Counters
from fabric.net.paths_api import BulkPaths
from fabric.net.ports import Gate
from fabric.net.routing_api import ContentRouting
from fabric.net.rpc_api import Rpc
from fabric.net.tasks import collapse_group


class ContentService:
    """Content of this peer and of the mesh. Made by :func:`open_content`."""

    def __init__(
        self,
        config: ContentConfig,
        blobs: BlobStore,
        net: ContentNet,
        counters: Counters,
        *,
        own: PeerId,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._blobs = blobs
        self._net = net
        self._counters = counters
        self._own = own
        self._rng = rng
        self._announcements = Announcements(config.republish_seconds, rng)
        self._announcing = trio.Lock()
        self._added = trio.Event()
        self._fetching: dict[BlobId, trio.Event] = {}
        self._downloads: dict[BlobId, Download] = {}

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve content and keep announcing what is complete here, until cancelled."""
        self._net.rpc.register_async(METHOD_MANIFEST, self._answer_manifest)
        self._net.rpc.register_async(METHOD_HAVE, self._answer_have)
        self._net.paths.serve_bulk(BULK_SERVICE, serve_content(self._blobs))
        for stat in await trio.to_thread.run_sync(self._blobs.ls):
            if stat.complete:
                self._announcements.add(stat.root, trio.current_time())
        task_status.started()
        while True:
            root = self._announcements.next_root(trio.current_time())
            if root is not None:
                await self._announce(root)
                continue
            due = self._announcements.next_timeout()
            with trio.move_on_at(float("inf") if due is None else due):
                await self._added.wait()
            self._added = trio.Event()

    async def provide(self, root: BlobId) -> int:
        """Announce ``root`` now and every hour; return how many peers stored it.

        Raises:
            Unavailable: it is not completely here.
        """
        if not await trio.to_thread.run_sync(self._blobs.has, root):
            raise Unavailable(f"content {root[:12]} is not completely here")
        stored = await self._announce(root)
        self._announcements.add(root, trio.current_time())
        self._announcements.on_announced(root, stored, trio.current_time())
        self._added.set()
        return stored

    def withdraw(self, root: BlobId) -> None:
        """Announce ``root`` no more."""
        self._announcements.remove(root)

    async def providers(self, root: BlobId) -> list[PeerId]:
        """Return the other peers said to hold ``root``; hints, never truth."""
        return await self._find(root, ())

    async def fetch(self, root: BlobId, peers: Iterable[PeerId] = ()) -> BlobId:
        """Have all of ``root`` here, from ``peers`` and whoever announced it.

        Bound it with ``trio.fail_after`` at the call site. Cancelled or failed: what
        arrived is kept and not fetched again. Two fetches of one root share one.
        Holders out of reach are waited for, ``config.holders_wait_seconds``.

        Raises:
            Unavailable: no reachable peer holds all of it (E_NO_CONTENT).
            IntegrityError: every peer's manifest is another content's.
            ResourceExhausted: no room; see its next step.
        """
        async with self._alone(root):
            if await trio.to_thread.run_sync(self._blobs.has, root):
                return root
            with collapse_group():
                async with self._receiving(root, tuple(peers)) as part:
                    await part.need([(0, part.manifest.size)])
        return root

    @asynccontextmanager
    async def partly(
        self, root: BlobId, peers: Iterable[PeerId] = ()
    ) -> AsyncIterator[PartialContent]:
        """Open ``root`` for some of its blocks; what is not here comes from others.

        What arrived is kept for the next time, until the store needs the room.

        Raises:
            Unavailable: no reachable peer knows it.
            IntegrityError: every peer's manifest is another content's.
        """
        async with self._alone(root):
            with self._blobs.keeps.held(root):
                if await trio.to_thread.run_sync(self._blobs.has, root):
                    manifest = await trio.to_thread.run_sync(self._blobs.manifest, root)
                    yield PartialContent(self._blobs, root, manifest, _all_here)
                    return
            with collapse_group():
                async with self._receiving(root, tuple(peers)) as part:
                    yield part

    @asynccontextmanager
    async def _alone(self, root: BlobId) -> AsyncIterator[None]:
        """Be the only one to receive ``root`` while inside."""
        while root in self._fetching:
            await self._fetching[root].wait()
        # no await between the look and the entry, or two fetches would start
        finished = self._fetching[root] = trio.Event()
        try:
            yield
        finally:
            finished.set()
            del self._fetching[root]

    def progress(self, root: BlobId) -> Progress | None:
        """Return how far the fetch of ``root`` is, or None when no block is fetched."""
        download = self._downloads.get(root)
        return None if download is None else download.progress()

    @asynccontextmanager
    async def _receiving(
        self, root: BlobId, given: tuple[PeerId, ...]
    ) -> AsyncIterator[PartialContent]:
        """Receive blocks of ``root`` while inside; complete, it becomes content."""

        async def search() -> list[PeerId]:
            return await self._find(root, given)

        manifest = await self._manifest(root, search)
        partial = await trio.to_thread.run_sync(
            self._blobs.open_partial, root, manifest, 0
        )

        async def download(blocks: int) -> None:
            await self._download(partial, blocks, search)

        try:
            with self._blobs.keeps.held(root):
                yield PartialContent(self._blobs, root, manifest, download)
        finally:
            self._blobs.release(partial)
            if not (partial.have or self._blobs.has(root)):
                self._blobs.remove(root)

    async def _download(
        self, partial: PartialBlob, blocks: int, search: Search
    ) -> None:
        root, num_blocks = partial.root, partial.manifest.num_blocks
        if blocks & ~partial.have:
            wanted = blocks_bytes(partial.manifest, blocks | partial.have)
            await trio.to_thread.run_sync(self._blobs.room.promise, root, wanted)
            swarm = Swarm(
                num_blocks,
                held=partial.have,
                skipped=bitmap.full(num_blocks) & ~blocks,
                rng=self._rng,
                window=self._config.window_blocks,
                timeout=self._config.block_timeout_seconds,
            )
            found = await search()
            download = Download(
                self._net, partial, swarm, search, self._config, self._counters
            )
            self._downloads[root] = download
            try:
                await download.run(found)
            finally:
                del self._downloads[root]
        if partial.complete and not self._blobs.has(root):
            await trio.to_thread.run_sync(self._blobs.finish, partial)
            self._announcements.add(root, trio.current_time())
            self._added.set()

    async def _manifest(self, root: BlobId, search: Search) -> BlobManifest:
        with suppress(Unavailable):  # left by an interrupted fetch
            return await trio.to_thread.run_sync(self._blobs.manifest, root)
        give_up_at = trio.current_time() + self._config.holders_wait_seconds
        while True:
            peers = list(await search())
            try:
                raw = await fetch_manifest(self._net.rpc, root, peers, self._config)
            except HoldersAway:
                if trio.current_time() >= give_up_at:
                    raise
                await trio.sleep(self._config.source_retry_seconds)
            else:
                return decode_manifest_untrusted(raw, root)

    async def _find(self, root: BlobId, given: Iterable[PeerId]) -> list[PeerId]:
        found: tuple[PeerId, ...] = ()
        with trio.move_on_after(self._config.call_timeout_seconds):
            # the caller's peers may do without routing
            with suppress(Unavailable, RemoteRefused):
                key = bytes.fromhex(root)
                found = await self._net.routing.find_providers(key, MAX_PROVIDERS)
        named = usable_providers(given, found, self._own)
        return [peer for peer in named if self._net.admits(peer)]

    async def _announce(self, root: BlobId) -> int:
        """Announce ``root`` when the pace allows; return how many peers stored it."""
        stored = 0
        async with self._announcing:
            await trio.sleep(self._announcements.pace(trio.current_time()))
            with trio.move_on_after(self._config.call_timeout_seconds):
                with suppress(Unavailable, RemoteRefused):  # the schedule retries
                    stored = await self._net.routing.provide(bytes.fromhex(root))
        self._announcements.on_announced(root, stored, trio.current_time())
        return stored

    async def _answer_manifest(self, peer: PeerId, request: bytes) -> bytes:
        root = _asked(request)
        answer: Message
        try:
            raw = await trio.to_thread.run_sync(self._blobs.raw_manifest, root)
            answer = Manifest(raw)
        except Unavailable:
            answer = NotHere()
        return CODEC.encode(answer)

    async def _answer_have(self, peer: PeerId, request: bytes) -> bytes:
        root = _asked(request)
        return CODEC.encode(await trio.to_thread.run_sync(self._have, root))

    def _have(self, root: BlobId) -> Have | NotHere:
        try:
            num_blocks = self._blobs.manifest(root).num_blocks
        except Unavailable:
            return NotHere()
        return Have(bitmap.encode(self._blobs.have_bitmap(root), num_blocks))


async def _all_here(blocks: int) -> None:
    await trio.lowlevel.checkpoint()


def _asked(request: bytes) -> BlobId:
    message = CODEC.decode_untrusted(request)
    if not isinstance(message, Ask):
        raise RemoteProtocolError(f"{type(message).__name__} instead of Ask")
    return BlobId(message.root)


@asynccontextmanager
async def open_content(
    config: ContentConfig,
    blobs: BlobStore,
    rpc: Rpc,
    paths: BulkPaths,
    routing: ContentRouting,
    gate: Gate,
    counters: Counters,
    *,
    own: PeerId,
    rng: random.Random | None = None,
) -> AsyncIterator[ContentService]:
    """Serve ``blobs`` to admitted peers and fetch from them, while inside.

    Args:
        config: Bounds and periods.
        blobs: The store on disk; owned by the caller.
        rpc: Small questions.
        paths: Bulk connections.
        routing: Provider records.
        gate: Asked before a provider is used.
        counters: Where bytes and bad blocks are counted.
        own: Our identity; never a provider for ourselves.
        rng: Source of the random choices; nothing secret depends on it.
    """
    net = ContentNet(rpc, paths, routing, gate)
    service = ContentService(
        config, blobs, net, counters, own=own, rng=rng or random.Random()
    )
    with collapse_group():
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            yield service
            nursery.cancel_scope.cancel()
