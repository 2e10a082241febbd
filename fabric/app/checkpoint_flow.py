"""A checkpoint's way from a worker's directory into content, and back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from checkpoints.directories import locate
from checkpoints.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    root_of,
)
from checkpoints.manifest_checks import load_manifest_untrusted
from checkpoints.mesh.replication_service import Replication
from checkpoints.mesh.selection import needed_ranges, select_names
from checkpoints.mesh.subset import write_subset
from checkpoints.verification import verify_checkpoint
from crdt_store.service import Store
from crdt_store.views import CheckpointHead
from dht.blobs import BlobStore
from dht.part_service import PartialContent
from dht.service import ContentService
from fabric.app.content_messages import FetchedView
from fabric.core.errors import ConfigError, IntegrityError
from fabric.core.ids import BlobId, JobId, PeerId
from fabric.jobs.spec import JobSpec
from training.resumption import check_state, resume_round, resume_tensors

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
        replication: Keeps copies of what has a head.
        folder: Where obtained checkpoints are laid out; can be deleted.
    """

    def __init__(
        self,
        own: PeerId,
        store: Store,
        blobs: BlobStore,
        content: ContentService,
        replication: Replication,
        folder: Path,
    ) -> None:
        self._own = own
        self._store = store
        self._blobs = blobs
        self._content = content
        self._replication = replication
        self._folder = folder
        self._laying_out = trio.Lock()

    async def publish(
        self, job: JobId, spec: JobSpec, directory: Path, round: int
    ) -> str:
        """Verify a step, move it into content and announce it; return its root.

        The head comes last: what has a head can be fetched.

        Args:
            job: Names the run.
            spec: Says how many copies are wanted and how many steps stay.
            directory: Of the step, or the one whose ``latest`` names it; it is gone
                afterwards, whatever happened.
            round: The round that it starts.

        Raises:
            IntegrityError: the step does not verify.
            ResourceExhausted: no room for it.
        """
        run = job[:RUN_CHARS]
        async with self._replication.publishing(run):
            try:
                root = await trio.to_thread.run_sync(self._add, directory, run)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(shutil.rmtree, directory, True)
            await self._content.provide(root)
            manifest = await trio.to_thread.run_sync(self._blobs.manifest, root)
            head = CheckpointHead(
                root=root,
                bytes=manifest.size,
                round=round,
                writer=self._own,
                copies=spec.checkpoint.replicas,
                keep=spec.checkpoint.keep,
                erasure=spec.checkpoint.erasure,
            )
            await self._store.heads.put(run, round, head)
        self._replication.wake()
        return root

    def _add(self, directory: Path, run: str) -> BlobId:
        report = verify_checkpoint(directory)
        if not report.ok:
            raise IntegrityError(
                f"the checkpoint in {directory} does not verify: {report.findings[0]}"
            )
        self._blobs.make_room(report.checked_bytes + MAX_MANIFEST_BYTES)
        keep = partial(self._blobs.keeps.keep, owner=run)
        return self._blobs.add_directory(locate(directory).path, mark=keep)

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
        with self._blobs.keeps.held(blob):
            with trio.fail_after(FETCH_SECONDS):
                await self._content.fetch(blob)
            async with self._laying_out:
                if not await trio.to_thread.run_sync(target.is_dir):
                    await trio.to_thread.run_sync(self._blobs.export, blob, target)
        return target

    async def first_round(self, spec: JobSpec) -> int:
        """Return the round at which a job resumes; reads the manifest alone.

        Raises:
            ConfigError: the job cannot go on from that checkpoint.
            Unavailable: no reachable peer holds it.
        """
        with trio.fail_after(FETCH_SECONDS):
            async with self._opened(spec.resume) as (_, manifest, _):
                return resume_round(spec, manifest)

    async def obtain_resumed(self, spec: JobSpec, target: Path) -> None:
        """Lay out what a job resumes from: the tensors it needs, holes elsewhere.

        Raises:
            Unavailable: no reachable peer holds it.
            ConfigError: the job cannot go on from that checkpoint.
        """
        await self.obtain_state(spec, spec.resume, spec.resume_round, target)

    async def obtain_state(
        self, spec: JobSpec, root: str, round: int, target: Path
    ) -> None:
        """Lay out the state of a job that a checkpoint holds, with holes elsewhere.

        Args:
            spec: The job's.
            root: Content root.
            round: The round that it must start.
            target: New directory.

        Raises:
            Unavailable: no reachable peer holds it.
            ConfigError: it is another checkpoint than that.
        """
        with trio.fail_after(FETCH_SECONDS):
            async with self._opened(root) as (part, manifest, _):
                check_state(spec.model, manifest, round)
                names = resume_tensors(spec.model)
                await part.need(needed_ranges(manifest, names, part.manifest))
                work = target.with_name(f"{target.name}.tmp")
                await trio.to_thread.run_sync(shutil.rmtree, work, True)
                await part.write_sparse(work)
        await trio.to_thread.run_sync(work.rename, target)

    async def fetch(self, root: str, target: Path, only: Sequence[str]) -> FetchedView:
        """Write checkpoint ``root``, or its tensors that ``only`` names, as ``target``.

        Args:
            root: Content root.
            target: New directory: a step.
            only: Patterns of tensor names; empty: everything.

        Raises:
            ConfigError: no checkpoint, ``target`` exists, or a pattern matches nothing.
            Unavailable: no reachable peer holds what is needed.
            ResourceExhausted: no room for it.
        """
        if await trio.to_thread.run_sync(target.exists):
            raise ConfigError(f"{target} exists", next_step="choose another target")
        if not only:
            return await self._fetch_all(content_root(root), target)
        with trio.fail_after(FETCH_SECONDS):
            async with self._opened(root) as (part, manifest, _):
                names = select_names(manifest, only)
                await part.need(needed_ranges(manifest, names, part.manifest))
                needed = part.needed_bytes
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                    sparse = Path(folder) / "part"
                    await part.write_sparse(sparse)
                    written = await trio.to_thread.run_sync(
                        write_subset, sparse, names, target, only
                    )
        return FetchedView(
            written, manifest.step, len(names), needed, part.manifest.size, str(target)
        )

    async def _fetch_all(self, blob: BlobId, target: Path) -> FetchedView:
        with trio.fail_after(FETCH_SECONDS), self._blobs.keeps.held(blob):
            async with self._opened(blob) as (part, manifest, root):
                size = part.manifest.size
                await part.need([(0, size)])
            await trio.to_thread.run_sync(self._blobs.export, blob, target)
        num = len(manifest.tensors) + len(manifest.aliases)
        return FetchedView(root, manifest.step, num, size, size, str(target))

    @asynccontextmanager
    async def _opened(
        self, root: str
    ) -> AsyncIterator[tuple[PartialContent, Manifest, str]]:
        """Open content and yield the checkpoint that it is: manifest and root."""
        async with self._content.partly(content_root(root)) as part:
            raw = await part.read_file(MANIFEST_NAME, MAX_MANIFEST_BYTES)
            manifest = await trio.to_thread.run_sync(load_manifest_untrusted, raw)
            yield part, manifest, root_of(raw)


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
