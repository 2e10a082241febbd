"""A checkpoint's way from a worker's directory into content, and back."""

from __future__ import annotations

from pathlib import Path

import trio

from checkpoints.directories import locate
from checkpoints.verification import verify_checkpoint
from crdt_store.service import Store
from crdt_store.views import CheckpointHead
from dht.blobs import BlobStore
from dht.service import ContentService
from fabric.core.errors import ConfigError, IntegrityError
from fabric.core.ids import BlobId, JobId, PeerId

FETCH_SECONDS = 3600.0
"""Longest a checkpoint may take to arrive; a stalled download fails much earlier."""
RUN_CHARS = 32
"""A run is named by the beginning of its job's id."""


class CheckpointFlow:
    """Publishes checkpoints of this peer and obtains those of others.

    Args:
        own: This peer.
        store: Where heads are published.
        blobs: Content on disk.
        content: Announces and fetches.
        folder: Where obtained checkpoints are laid out; can be deleted.
    """

    def __init__(
        self,
        own: PeerId,
        store: Store,
        blobs: BlobStore,
        content: ContentService,
        folder: Path,
    ) -> None:
        self._own = own
        self._store = store
        self._blobs = blobs
        self._content = content
        self._folder = folder

    async def publish(self, job: JobId, directory: Path, round: int) -> str:
        """Verify a step, keep it as content and announce it; return its root.

        Args:
            job: Names the run.
            directory: Of the step, or the one whose ``latest`` names it.
            round: The outer round whose end it holds.

        Raises:
            IntegrityError: the step does not verify.
            ResourceExhausted: no room for it.
        """
        report = await trio.to_thread.run_sync(verify_checkpoint, directory)
        if not report.ok:
            raise IntegrityError(
                f"the checkpoint in {directory} does not verify: {report.findings[0]}"
            )
        step = await trio.to_thread.run_sync(locate, directory)
        root = await trio.to_thread.run_sync(self._blobs.add_directory, step.path)
        await trio.to_thread.run_sync(self._blobs.pin, root)
        await self._content.provide(root)
        size = self._blobs.manifest(root).size
        head = CheckpointHead(root=root, bytes=size, round=round, writer=self._own)
        await self._store.heads.put(job[:RUN_CHARS], round, head)
        return root

    async def obtain(self, root: str) -> Path:
        """Return the directory of checkpoint ``root``, fetched if it is not here.

        Raises:
            ConfigError: ``root`` is not the name of content.
            Unavailable: no reachable peer holds it.
            IntegrityError: what arrived does not verify.
        """
        blob = content_root(root)
        target = self._folder / blob
        if await trio.to_thread.run_sync(target.is_dir):
            return target
        with trio.fail_after(FETCH_SECONDS):
            await self._content.fetch(blob)
        await trio.to_thread.run_sync(self._blobs.export, blob, target)
        return target


def content_root(text: str) -> BlobId:
    """Return ``text`` as the root of content.

    Raises:
        ConfigError: not 64 hex characters.
    """
    root = text.removeprefix("blob:")
    if len(root) != 64 or set(root) - set("0123456789abcdef"):
        raise ConfigError(
            f"{text[:80]!r} is not a content root",
            next_step="`fabric content ls` lists the content held here",
        )
    return BlobId(root)
