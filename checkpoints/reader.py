"""Load any box of any tensor of a checkpoint, each touched byte verified.

A read is the intersection of the wanted box with the saved chunks, cut into contiguous
runs. Blocks that a run covers whole go from the file straight into the destination,
four at a time, and are hashed there; a block that is touched in part is read once into
a small cache, hashed, and copied from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Self

from typing_extensions import override

from checkpoints.box_reader import BoxReader
from checkpoints.boxes import Box, intersect, runs, whole
from checkpoints.directories import disk_errors, locate
from checkpoints.dtypes import item_bytes, tensor_bytes
from checkpoints.formats.source import Ignored
from checkpoints.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Json,
    Manifest,
    TensorEntry,
    root_of,
)
from checkpoints.manifest_checks import load_manifest_untrusted
from checkpoints.verified_file import BlockCache, VerifiedFile
from fabric.core.errors import IntegrityError


class CheckpointReader(BoxReader[TensorEntry]):
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
        data = _read_manifest_bytes(location.path)
        self.root = root_of(data)
        for wanted in (root, location.root):
            if wanted and wanted != self.root:
                raise IntegrityError(
                    f"{location.path}: root {self.root}, wanted {wanted}",
                    code="E_ROOT",
                    next_step="the manifest was changed or is another step's",
                )
        self.manifest: Manifest = load_manifest_untrusted(data)
        super().__init__(location.path, self.manifest.tensors, self.manifest.aliases)
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
    def state(self) -> Mapping[str, Json]:
        """Everything that is not a tensor."""
        return self.manifest.state

    def boxes(self, name: str) -> Sequence[Box]:
        """Return the boxes in which a tensor is stored."""
        return [chunk.box for chunk in self.entry(name).chunks]

    def read_tensor(self, name: str) -> bytearray:
        """Return all bytes of a tensor, row-major."""
        entry = self.entry(name)
        out = bytearray(tensor_bytes(entry.dtype, entry.shape))
        self.read_box(name, whole(entry.shape).offsets, entry.shape, out)
        return out

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

    @override
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
