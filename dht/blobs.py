"""The content store on disk. Blocking: call it in threads. One process per directory.

    data/<root>        complete, verified, never changed
    parts/<root>       still arriving (``partial.py``)
    manifests/<root>   encoded manifest; written before either of the above
    pins, keeps        who wants what (``keeps.py``); the rest may be collected
    incoming/*         being added; removed at the next start

A blob becomes visible by the rename into ``data``, after every byte is on the disk.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dht import bitmap
from dht.collecting import collectable, drop_leftovers
from dht.disk import disk_errors, sync_folder, write_durably
from dht.export import BlobReader, write_target
from dht.ingest import BlockWriter, directory_files
from dht.keeps import Keeps
from dht.manifest import (
    BlobManifest,
    BlobStat,
    FileEntry,
    decode_manifest_untrusted,
    encode_manifest,
)
from dht.partial import PartialBlob
from dht.room import Room
from fabric.core.errors import (
    ConfigError,
    IntegrityError,
    LocalProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import BlobId

E_NO_CONTENT = "E_NO_CONTENT"
_FOLDERS = ("data", "parts", "manifests", "incoming")

Mark = Callable[[BlobId], None]
"""Says that somebody wants new content, before it can be seen and thus collected."""


class BlobStore:
    """Content by root.

    Args:
        directory: Owned by this store; created if missing.
        max_bytes: Most bytes kept, complete and arriving together.

    Attributes:
        keeps: Who wants what.
        room: What is used and what still fits.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._dir = directory
        self._lock = threading.RLock()
        self._open: dict[BlobId, PartialBlob] = {}
        for folder in _FOLDERS:
            (directory / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.keeps = Keeps(directory)
        self.room = Room(directory, max_bytes)
        drop_leftovers(directory)

    def add_bytes(
        self,
        data: bytes,
        name: str = "",
        meta: Mapping[str, str] | None = None,
        mark: Mark | None = None,
    ) -> BlobId:
        """Keep ``data`` as one blob and return its root; ``mark`` is called first."""
        with self.adding(len(data)) as writer:
            writer.write(data)
            return self.finish_add(writer, name, meta, (), mark)

    def add_file(self, path: Path, mark: Mark | None = None) -> BlobId:
        """Keep a copy of the file at ``path`` and return its root.

        Raises:
            ConfigError: not a regular file.
            ResourceExhausted: no room; nothing is left behind.
        """
        if not path.is_file():
            raise ConfigError(f"{path} is not a file")
        with self.adding(path.stat().st_size) as writer:
            writer.copy(path)
            return self.finish_add(writer, path.name, None, (), mark)

    def add_directory(
        self,
        path: Path,
        meta: Mapping[str, str] | None = None,
        mark: Mark | None = None,
    ) -> BlobId:
        """Keep a copy of every file below ``path`` as one blob and return its root.

        Names and contents are kept; empty directories, modes and times are not.

        Raises:
            ConfigError: no directory, no files, or it holds a link or a device.
            ResourceExhausted: the store or the disk is full; nothing is left behind.
        """
        files = directory_files(path)
        total = sum(file.stat().st_size for _, file in files)
        entries = []
        with self.adding(total) as writer:
            for name, file in files:
                offset = writer.size
                writer.copy(file)
                entries.append(FileEntry(name, offset, writer.size - offset))
            return self.finish_add(writer, path.name, meta, tuple(entries), mark)

    def add_pinned(self, path: Path) -> BlobId:
        """Keep and pin a copy of the file or directory at ``path``."""
        add = self.add_directory if path.is_dir() else self.add_file
        return add(path, mark=self.keeps.pin)

    def has(self, root: BlobId) -> bool:
        """Return whether all of ``root`` is here."""
        return self._path("data", root).exists()

    def manifest(self, root: BlobId) -> BlobManifest:
        """Return the manifest of ``root``.

        Raises:
            Unavailable: not here.
            IntegrityError: the file on disk is damaged.
        """
        return decode_manifest_untrusted(self.raw_manifest(root), root)

    def raw_manifest(self, root: BlobId) -> bytes:
        """Return the encoded manifest, as its root was computed.

        Raises:
            Unavailable: not here.
        """
        try:
            return self._path("manifests", root).read_bytes()
        except FileNotFoundError:
            raise Unavailable(
                f"content {root[:12]} is not here",
                code=E_NO_CONTENT,
                next_step=f"fetch it with `fabric content get {root}`",
            ) from None

    def have_bitmap(self, root: BlobId) -> int:
        """Return which blocks of ``root`` can be read here (see ``bitmap.py``)."""
        if self.has(root):
            return bitmap.full(self.manifest(root).num_blocks)
        with self._lock:
            partial = self._open.get(root)
        return partial.have if partial else 0

    def read_block(self, root: BlobId, index: int) -> bytes:
        """Return block ``index`` of ``root``, verified.

        Raises:
            FabricError: not here, or damaged.
        """
        num_blocks = self.manifest(root).num_blocks
        if not 0 <= index < num_blocks:
            raise ValueError(f"block {index} of {num_blocks}")
        if not self.have_bitmap(root) >> index & 1:
            raise Unavailable(f"block {index} of {root[:12]} is not here")
        with self.open_reader(root) as reader:
            return reader.read_verified(index)

    @contextmanager
    def open_reader(self, root: BlobId) -> Iterator[BlobReader]:
        """Open ``root`` for reading many blocks, complete or arriving.

        Blocks are not verified: whoever receives them does.

        Raises:
            Unavailable: not here.
        """
        with self._lock:
            partial = self._open.get(root)
        manifest = partial.manifest if partial else self.manifest(root)
        data = self._path("data", root)
        if not data.exists() and partial is not None:
            yield BlobReader(manifest, None, partial)
            return
        try:
            file = data.open("rb", buffering=0)
        except FileNotFoundError:
            raise Unavailable(f"content {root[:12]} is not here") from None
        with file:
            os.utime(file.fileno())  # last use, for gc
            yield BlobReader(manifest, file.fileno(), None)

    def export(self, root: BlobId, target: Path) -> None:
        """Restore ``root`` as the file or directory ``target``, verified.

        Raises:
            ConfigError: ``target`` exists.
            Unavailable: not (completely) here.
            IntegrityError: the bytes on disk are damaged.
            ResourceExhausted: the disk is full. In all cases ``target`` is not made.
        """
        if not self.has(root):
            raise Unavailable(f"content {root[:12]} is not (completely) here")
        if target.exists():
            raise ConfigError(f"{target} exists", next_step="choose another target")
        with self.open_reader(root) as reader:
            write_target(reader, target)

    def open_partial(
        self, root: BlobId, manifest: BlobManifest, wanted_bytes: int | None = None
    ) -> PartialBlob:
        """Start or resume receiving ``root``. Close it when done or interrupted.

        Args:
            root: What to receive.
            manifest: Its manifest.
            wanted_bytes: As much of it as is wanted, if not all.

        Raises:
            LocalProtocolError: complete, or being received already.
            ResourceExhausted: the store or the disk has no room for it.
        """
        named, raw = encode_manifest(manifest)
        if named != root:
            raise IntegrityError(f"manifest does not match root {root[:12]}")
        part = self._path("parts", root)
        with self._lock:
            if root in self._open or self.has(root):
                raise LocalProtocolError(f"{root[:12]} is here or being received")
            wanted = manifest.size if wanted_bytes is None else wanted_bytes
            self.room.promise(root, wanted)
            try:
                self._keep_manifest(root, raw)
                partial = PartialBlob(root, manifest, part)
            except ResourceExhausted:
                self.room.forget(root)
                part.unlink(missing_ok=True)
                self._path("manifests", root).unlink(missing_ok=True)
                raise
            self._open[root] = partial
        return partial

    def finish(self, partial: PartialBlob) -> None:
        """Make a complete ``partial`` visible and close it.

        Raises:
            LocalProtocolError: blocks are missing.
        """
        if not partial.complete:
            raise LocalProtocolError(f"{partial.root[:12]} lacks blocks")
        partial.sync()
        self._publish(partial.path, partial.root)
        self.release(partial)

    def release(self, partial: PartialBlob) -> None:
        """Close ``partial``; what it verified is kept for the next attempt."""
        with self._lock:
            self._open.pop(partial.root, None)
            self.room.forget(partial.root)
        partial.close()

    def pin(self, root: BlobId) -> None:
        """Keep ``root`` when the store is collected."""
        with self._lock:
            self.raw_manifest(root)
            self.keeps.pin(root)

    def unpin(self, root: BlobId) -> None:
        """Let ``root`` be collected."""
        self._path("data", root)  # refuses what is no root
        self.keeps.unpin(root)

    def stat(self, root: BlobId) -> BlobStat:
        """Return the facts about ``root``; a part at rest counts as nothing held."""
        manifest = self.manifest(root)
        held = self.have_bitmap(root).bit_count()
        pinned = self.keeps.pinned(root)
        return BlobStat(
            root,
            manifest.name,
            manifest.size,
            manifest.num_blocks,
            held,
            len(manifest.entries),
            pinned,
        )

    def ls(self) -> list[BlobStat]:
        """Return every blob, complete or arriving, by root."""
        found = []
        for name in sorted(p.name for p in (self._dir / "manifests").iterdir()):
            with suppress(Unavailable):  # removed meanwhile
                if not name.endswith(".tmp"):
                    found.append(self.stat(BlobId(name)))
        return found

    def remove(self, root: BlobId, owner: str = "") -> bool:
        """Remove ``root`` unless somebody wants it or it is being received.

        Args:
            root: What to remove.
            owner: Wants it no longer. Its mark stays as long as ``root`` is received.

        Returns:
            Whether it is gone. Who reads it at this moment reads on.
        """
        with self._lock:
            if root in self._open:
                return False
            if owner:
                self.keeps.drop(root, owner)
            if root in self.keeps.wanted():
                return False
            for folder in ("data", "parts", "manifests"):
                self._path(folder, root).unlink(missing_ok=True)
        return True

    def make_room(self, size: int) -> None:
        """Remove what nobody wants as far as ``size`` more bytes need it."""
        if self.room.free() < size:
            self.gc(max(0, self.room.max_bytes - size))

    def gc(self, keep_bytes: int = 0) -> list[BlobId]:
        """Remove blobs that nobody wants until at most ``keep_bytes`` are used.

        Parts at rest go first, then the complete blobs used least recently.
        """
        removed = []
        with self._lock:
            for path in collectable(self._dir, {*self.keeps.wanted(), *self._open}):
                if self.room.used() <= keep_bytes:
                    break
                root = BlobId(path.name)
                path.unlink()
                self._path("manifests", root).unlink(missing_ok=True)
                removed.append(root)
        return removed

    @contextmanager
    def adding(self, size: int) -> Iterator[BlockWriter]:
        """Hold room for ``size`` bytes and a file to write; removed on any error."""
        with self.room.reserved(size):
            handle, name = tempfile.mkstemp(dir=self._dir / "incoming")
            try:
                with os.fdopen(handle, "wb", buffering=0) as file, disk_errors():
                    yield BlockWriter(file, Path(name))
            finally:
                Path(name).unlink(missing_ok=True)

    def finish_add(
        self,
        writer: BlockWriter,
        name: str,
        meta: Mapping[str, str] | None,
        entries: tuple[FileEntry, ...],
        mark: Mark | None = None,
    ) -> BlobId:
        """Make what was written visible and return its root."""
        hashes = writer.finish()
        root, raw = encode_manifest(
            BlobManifest(
                name=name,
                size=writer.size,
                hashes=hashes,
                meta=dict(meta or {}),
                entries=entries,
            )
        )
        decode_manifest_untrusted(raw, root)  # what others would refuse, we refuse now
        with self._lock:
            if mark is not None:
                mark(root)
            self._keep_manifest(root, raw)
            self._publish(writer.path, root)
        return root

    def _keep_manifest(self, root: BlobId, raw: bytes) -> None:
        path = self._path("manifests", root)
        if not path.exists():
            write_durably(path, raw)

    def _publish(self, work: Path, root: BlobId) -> None:
        """Rename the synced file ``work`` into place and make the rename durable."""
        work.rename(self._path("data", root))
        sync_folder(self._dir / "manifests")
        sync_folder(self._dir / "data")

    def _path(self, folder: str, root: str) -> Path:
        if len(root) != 64 or not set(root) <= set("0123456789abcdef"):
            raise ValueError(f"not a content root: {root[:80]!r}")
        return self._dir / folder / root
