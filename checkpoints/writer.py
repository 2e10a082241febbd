"""Save a checkpoint so that a crash at any moment leaves none or a whole one.

    step-N.tmp/        made and locked by begin()
      writer-k.safetensors ...   each hashed while written, then synced
      manifest.json    last, synced
    latest.tmp         synced
    step-N/            by rename, parent directory synced
    latest             by rename, parent directory synced

A committed step is never overwritten. What a crash leaves is a ``step-N.tmp`` that no
reader looks at and the next save of that step removes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoints.directories import (
    LATEST_NAME,
    disk_errors,
    locked,
    step_path,
    sync_directory,
    write_synced,
)
from checkpoints.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Json,
    Manifest,
    TensorEntry,
    encode_manifest,
    root_of,
)
from checkpoints.manifest_checks import check_manifest, load_manifest_untrusted
from checkpoints.parts import (
    MAX_FILE_BYTES,
    ChunkSource,
    Hook,
    WriterPart,
    no_hook,
    write_part,
)
from fabric.core.errors import ConfigError, IntegrityError, LocalProtocolError


class CheckpointWriter:
    """One step being saved. Leaving the block without a commit removes what it wrote.

    ::

        with CheckpointWriter(directory, step) as writer:
            part = writer.write("rank0", sources)
            root = writer.commit([part], state={"step": step})

    Writers in other processes call :func:`checkpoints.parts.write_part` on
    :attr:`temporary` and send their :class:`WriterPart` to the one that commits.

    Args:
        directory: Holds the steps; made if missing.
        step: Number of the step.
        on_point: Told each point of the save (tests kill the process there).
    """

    def __init__(self, directory: Path, step: int, *, on_point: Hook = no_hook) -> None:
        self.path = step_path(directory, step)
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self._directory = directory
        self._step = step
        self._on_point = on_point
        self._lock = -1
        self._committed = False

    def __enter__(self) -> Self:
        """Make and lock ``step-N.tmp``; remove what a crashed save left in it.

        Raises:
            ConfigError: the step exists, or another process is saving it.
        """
        with disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._refuse_existing()
            self._lock = self._lock_temporary()
            try:
                for stale in self.temporary.iterdir():
                    stale.unlink()
            except OSError:
                os.close(self._lock)
                raise
        self._on_point("begun")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed:
            shutil.rmtree(self.temporary, ignore_errors=True)
        os.close(self._lock)

    def write(
        self,
        writer: str,
        sources: Sequence[ChunkSource],
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> WriterPart:
        """Write this process's part; see :func:`checkpoints.parts.write_part`."""
        return write_part(
            self.temporary,
            writer,
            sources,
            max_file_bytes=max_file_bytes,
            on_point=self._on_point,
        )

    def commit(
        self,
        parts: Iterable[WriterPart],
        *,
        state: Mapping[str, Json],
        aliases: Mapping[str, str] | None = None,
        layout: Mapping[str, Json] | None = None,
        parent: str = "",
    ) -> str:
        """Make the step exist, whole, and return its root.

        Args:
            parts: Records of all writers; their chunks must tile every tensor.
            state: Everything that is not a tensor.
            aliases: Name -> name of the stored tensor it is tied to.
            layout: The parallel layout that wrote it, for people.
            parent: Root of the checkpoint it follows, or empty.

        Raises:
            IntegrityError: a gap, an overlap, or a file that is not as recorded.
            ResourceExhausted: the disk is full. Nothing was committed.
            ConfigError: the step exists, or the file system refused.
            ValueError: ``state`` or ``layout`` is not JSON.
        """
        files, tensors = merge_parts(parts)
        manifest = Manifest(
            format=FORMAT_NAME,
            version=FORMAT_VERSION,
            step=self._step,
            tensors=tensors,
            files=files,
            aliases=dict(aliases or {}),
            state=dict(state),
            layout=dict(layout or {}),
            parent=parent,
        )
        check_manifest(manifest)
        data = encode_manifest(manifest)
        load_manifest_untrusted(data)  # never commit what no reader would accept
        root = root_of(data)
        with disk_errors(self.temporary):
            self._check_files(files)
            write_synced(self.temporary / MANIFEST_NAME, data)
            self._on_point("manifest.synced")
            sync_directory(self.temporary)
            self._on_point("directory.synced")
            self.publish(root)
        return root

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise ConfigError(
                f"{self.path} exists; a committed step is never overwritten",
                code="E_STEP_EXISTS",
                next_step="save under another step, or remove that one yourself",
            )

    def _lock_temporary(self) -> int:
        """Return an open, locked descriptor of ``step-N.tmp``."""
        self.temporary.mkdir(exist_ok=True)
        lock = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(lock), self.temporary.stat())
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            os.close(lock)
            raise ConfigError(
                f"another process is saving {self.path}",
                code="E_STEP_BUSY",
                next_step="let it finish, or save under another step",
            )
        return lock

    def _check_files(self, files: Mapping[str, FileEntry]) -> None:
        """Pass if the temporary directory holds just the recorded files."""
        found = {each.name: each.stat().st_size for each in self.temporary.iterdir()}
        recorded = {name: file.size for name, file in files.items()}
        if found != recorded:
            wrong = sorted(set(found.items()) ^ set(recorded.items()))
            raise IntegrityError(
                f"{self.temporary}: files differ from the records: {wrong[:4]}",
                code="E_PARTS",
            )

    def publish(self, root: str) -> None:
        """Rename the step, whole and synced, into place; point ``latest`` at it.

        The new ``latest`` is written before, so that a full disk refuses the step
        instead of leaving one that ``latest`` does not know.
        """
        with locked(self._directory):
            self._refuse_existing()
            latest = self._directory / f"{LATEST_NAME}.tmp"
            latest.unlink(missing_ok=True)
            write_synced(latest, f"{self.path.name} {root}\n".encode())
            self._on_point("latest.synced")
            self.temporary.rename(self.path)
            self._committed = True
            self._on_point("renamed")
            sync_directory(self._directory)
            self._on_point("step.synced")
            latest.rename(self._directory / LATEST_NAME)
            self._on_point("latest.renamed")
            sync_directory(self._directory)


def merge_parts(
    parts: Iterable[WriterPart],
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """Return all files, and all tensors with the chunks of all writers, in box order.

    Raises:
        LocalProtocolError: two parts name one file, or disagree about a tensor.
    """
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for part in parts:
        if not files.keys().isdisjoint(part.files):
            raise LocalProtocolError(f"two parts of writer {part.writer!r}")
        files.update(part.files)
        for name, entry in part.tensors.items():
            known = tensors.get(name, entry)
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise LocalProtocolError(f"writers disagree about {name!r}")
            chunks = (tensors[name].chunks if name in tensors else ()) + entry.chunks
            tensors[name] = TensorEntry(
                entry.dtype, entry.shape, tuple(sorted(chunks, key=lambda c: c.box))
            )
    return files, tensors
