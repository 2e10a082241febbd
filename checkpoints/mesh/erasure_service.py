"""Makes the pieces of checkpoints that ask for them, and wholes from pieces."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import trio
from msgspec.structs import replace

from checkpoints.mesh.replicas import Want
from checkpoints.mesh.wants import code_of
from crdt_store.views import CheckpointHead, Heads
from dht.blobs import BlobStore
from dht.erasure import make_pieces, restore
from dht.service import ContentService
from fabric.core.errors import FabricError
from fabric.core.ids import BlobId, PeerId

log = logging.getLogger(__name__)

Newest = Mapping[str, Mapping[int, CheckpointHead]]


class Erasure:
    """The erasure-coded checkpoints that are this peer's to work on; one at a time.

    Args:
        own: This peer.
        heads: Where pieces are announced.
        blobs: Content on disk.
        content: Fetches pieces.
        fetch_seconds: Longest fetch of one piece.
    """

    def __init__(
        self,
        own: PeerId,
        heads: Heads,
        blobs: BlobStore,
        content: ContentService,
        fetch_seconds: float,
    ) -> None:
        self._own, self._heads = own, heads
        self._blobs, self._content = blobs, content
        self._fetch_seconds = fetch_seconds
        self._failed: set[str] = set()
        """Wholes that could not be worked on; not tried again by this process."""

    async def announce(self, newest: Newest) -> bool:
        """Make the pieces of one checkpoint that we wrote; return whether one was due.

        The head names them only once all are here, whole.
        """
        for run, heads in newest.items():
            for step, head in sorted(heads.items(), reverse=True):
                data, extra = code_of(head)
                if not data or head.pieces or head.writer != self._own:
                    continue
                if head.root in self._failed:
                    continue
                root = BlobId(head.root)
                try:
                    pieces = await self._make(run, root, data, extra)
                    if self._heads.newest(run).get(step) == head:  # not retired since
                        await self._heads.put(run, step, replace(head, pieces=pieces))
                except (FabricError, OSError) as exc:
                    self._fail(head.root, exc)
                return True
        return False

    async def _make(
        self, run: str, root: BlobId, data: int, extra: int
    ) -> tuple[BlobId, ...]:
        size = (await trio.to_thread.run_sync(self._blobs.manifest, root)).size
        room = (data + extra) * (size // data + (2 << 20))
        await trio.to_thread.run_sync(self._blobs.make_room, room)
        keep = partial(self._blobs.keeps.keep, owner=run)
        return await trio.to_thread.run_sync(
            make_pieces, self._blobs, root, data, extra, keep
        )

    async def remake(self, want: Want, lost: frozenset[BlobId]) -> None:
        """Make the pieces of a whole again; those that others alone hold go."""
        if want.root in self._failed:
            return
        extra = len(want.pieces) - want.needed
        has = self._blobs.has
        try:
            here = {p for p in want.pieces if await trio.to_thread.run_sync(has, p)}
            made = await self._make(want.run, want.root, want.needed, extra)
            for piece in set(made) - lost - here:
                await trio.to_thread.run_sync(self._blobs.remove, piece, want.run)
        except (FabricError, OSError) as exc:
            self._fail(want.root, exc)
        else:
            log.info("erasure.remade root=%s pieces=%d", want.root[:12], len(lost))

    async def restore(self, want: Want) -> None:
        """Restore a whole that nobody holds any more."""
        try:
            here = 0
            for piece in want.pieces:
                here += await self._obtain(piece)
                if here == want.needed:
                    break
            await trio.to_thread.run_sync(self._blobs.make_room, want.size)
            await trio.to_thread.run_sync(self._blobs.keeps.keep, want.root, want.run)
            await trio.to_thread.run_sync(
                restore, self._blobs, want.root, want.pieces, want.needed
            )
        except (FabricError, OSError) as exc:
            log.warning("erasure.not_restored root=%s %r", want.root[:12], exc)
        else:
            log.info("erasure.restored root=%s", want.root[:12])

    async def _obtain(self, piece: BlobId) -> bool:
        try:
            with trio.fail_after(self._fetch_seconds):
                await self._content.fetch(piece)
        except (FabricError, trio.TooSlowError):
            return False
        return True

    def _fail(self, root: str, why: Exception) -> None:
        self._failed.add(root)
        log.warning("erasure.failed root=%s %r", root[:12], why)
