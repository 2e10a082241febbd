"""Load any box of any tensor of a checkpoint, each touched byte verified.

A read is the intersection of the wanted box with the saved chunks, cut into contiguous
runs. Blocks that a run covers whole go from the file straight into the destination,
four at a time, and are hashed there; a block that is touched in part is read once into
a small cache, hashed, and copied from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoints.boxes import Box, flat_boxes, inside, intersect, runs, whole
from checkpoints.directories import disk_errors, locate
from checkpoints.dtypes import item_bytes, tensor_bytes
from checkpoints.formats.source import Ignored
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Json,
    Manifest,
    TensorEntry,
    root_of,
)
from checkpoints.manifest_checks import load_manifest_untrusted
from checkpoints.parts import WINDOW_BYTES
from checkpoints.verified_file import BlockCache, VerifiedFile
from fabric.core.errors import ConfigError, IntegrityError


class CheckpointReader:
    """A committed checkpoint, open for reading by one thread.

    Args:
        path: A step's directory, or the directory whose ``latest`` names one.
        root: Root id it must have, or empty for the one in ``latest`` if that is how
            it was found. With a root, nothing in the directory need be trusted.

    Raises:
        ConfigError: there is no checkpoint.
        IntegrityError: the manifest is damaged, or has another root.
    """

    format = "canonical"
    ignored: Sequence[Ignored] = ()

    def __init__(self, path: Path, *, root: str = "") -> None:
        location = locate(path)
        self.path = location.path
        data = _read_manifest_bytes(self.path)
        self.root = root_of(data)
        for wanted in (root, location.root):
            if wanted and wanted != self.root:
                raise IntegrityError(
                    f"{self.path}: root {self.root}, wanted {wanted}",
                    code="E_ROOT",
                    next_step="the manifest was changed or is another step's",
                )
        self.manifest: Manifest = load_manifest_untrusted(data)
        self._files: dict[str, VerifiedFile] = {}
        self._cache = BlockCache()
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.clear()
        self._closing.close()

    def fork(self) -> Self:
        """Return a reader of the same manifest, for another thread."""
        other = copy(self)
        other._files = {}
        other._cache = BlockCache()
        other._closing = ExitStack()
        return other

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name -> name of the stored tensor it is tied to."""
        return self.manifest.aliases

    @property
    def state(self) -> Mapping[str, Json]:
        """Everything that is not a tensor."""
        return self.manifest.state

    def boxes(self, name: str) -> Sequence[Box]:
        """Return the boxes in which a tensor is stored."""
        return [chunk.box for chunk in self.entry(name).chunks]

    def names(self) -> list[str]:
        """Return the names of all tensors and aliases, sorted."""
        return sorted([*self.manifest.tensors, *self.manifest.aliases])

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of a tensor or of an alias's target.

        Raises:
            ConfigError: there is none of that name.
        """
        entry = self.manifest.tensors.get(self.manifest.aliases.get(name, name))
        if entry is None:
            raise ConfigError(
                f"no tensor {name!r} in {self.path}",
                code="E_NO_TENSOR",
                next_step="`fabric-ckpt inspect` lists the names",
            )
        return entry

    def read_box(
        self,
        name: str,
        offsets: Sequence[int],
        sizes: Sequence[int],
        out: bytearray | memoryview,
        *,
        dtype: str = "",
    ) -> None:
        """Fill ``out`` with one box of a tensor, row-major.

        Args:
            name: Tensor or alias.
            offsets: First element in each dimension.
            sizes: Elements in each dimension.
            out: Writable, of exactly the box's bytes.
            dtype: Element type that the caller expects; empty = whatever is stored.

        Raises:
            ConfigError: no such tensor or box, or of another type: nothing is cast.
            IntegrityError: a touched block is not what the manifest says; ``out`` is
                then undefined.
        """
        entry = self.entry(name)
        if dtype and dtype != entry.dtype:
            raise ConfigError(
                f"{name!r} is {entry.dtype}, wanted {dtype}",
                code="E_DTYPE",
                next_step="load it as stored and convert it yourself",
            )
        box = Box(tuple(offsets), tuple(sizes))
        if not inside(box, entry.shape):
            raise ConfigError(
                f"{name!r}: {box} outside shape {list(entry.shape)}", code="E_BOUNDS"
            )
        view = memoryview(out).cast("B")
        if len(view) != tensor_bytes(entry.dtype, box.sizes):
            raise ValueError(f"{name!r}: buffer of {len(view)} B for {box}")
        if view:
            self._fill(entry, box, view)

    def read_tensor(self, name: str) -> bytearray:
        """Return all bytes of a tensor, row-major."""
        entry = self.entry(name)
        out = bytearray(tensor_bytes(entry.dtype, entry.shape))
        self.read_box(name, whole(entry.shape).offsets, entry.shape, out)
        return out

    def windows(self, name: str, window_bytes: int = WINDOW_BYTES) -> Iterator[Buffer]:
        """Yield a tensor's bytes in row-major order, in bounded memory.

        Each buffer is overwritten by the next.
        """
        entry = self.entry(name)
        item = item_bytes(entry.dtype)
        total = whole(entry.shape).volume
        step = max(1, window_bytes // item)
        view = memoryview(bytearray(min(step, total) * item))
        for begin in range(0, total, step):
            end = min(begin + step, total)
            at = 0
            for box in flat_boxes(entry.shape, begin, end):
                stop = at + box.volume * item
                self._fill(entry, box, view[at:stop])
                at = stop
            yield view[:at]

    def file(self, name: str) -> VerifiedFile:
        """Return an open file of the checkpoint.

        Raises:
            IntegrityError: missing, or not of the recorded size.
        """
        if name not in self._files:
            opened = VerifiedFile(
                self.path / name, self.manifest.files[name], self._cache
            )
            self._files[name] = self._closing.enter_context(opened)
        return self._files[name]

    def _fill(self, entry: TensorEntry, box: Box, out: memoryview) -> None:
        item = item_bytes(entry.dtype)
        filled = 0
        for chunk in entry.chunks:
            part = intersect(chunk.box, box)
            if part is None:
                continue
            file = self.file(chunk.file)
            for run in runs(part, chunk.box, box):
                at = run.target * item
                length = run.length * item
                file.read_into(chunk.begin + run.source * item, out[at : at + length])
                filled += length
        # The manifest's chunks tile the tensor, so this is our own arithmetic.
        assert filled == len(out)


def _read_manifest_bytes(path: Path) -> bytes:
    with disk_errors(path), (path / MANIFEST_NAME).open("rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)
