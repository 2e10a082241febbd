"""A source whose index said where each element lies: the reader of foreign formats.

What can be checked is checked when the source is opened: the extents of a tensor tile
it exactly, and each lies inside a regular file of its directory. Missing and truncated
files are refused here, before a byte is written anywhere. Where a format has checksums,
each is checked before the first byte of its range is used.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import msgspec
from typing_extensions import override

from checkpoints.box_reader import BoxReader
from checkpoints.boxes import (
    Box,
    Index,
    inside,
    intersect,
    runs,
    strides_of,
    tiling_fault,
)
from checkpoints.dtypes import item_bytes
from checkpoints.formats.checksums import Checksum, Checksums, Stream
from checkpoints.formats.source import Ignored
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import Json
from checkpoints.parts import WINDOW_BYTES
from checkpoints.strided import Grid, copy_strided
from fabric.core.errors import IntegrityError

MAX_OPEN_FILES = 64
SPAN_BYTES = 4 << 20
"""Most that is read at once to pick strided elements from."""
SMALL_SPAN_BYTES = 64 << 10
"""Reading this much costs about as much as asking for it."""


class Extent(msgspec.Struct, frozen=True):
    """Where one box of a tensor is stored.

    Attributes:
        box: The elements, in the tensor's coordinates.
        file: Path relative to the source's directory, with forward slashes.
        begin: Byte of the box's first element in the file.
        strides: Elements from one index to the next in each dimension, as they lie in
            the file; None if the box is stored row-major without gaps.
    """

    box: Box
    file: str
    begin: int
    strides: Index | None = None

    def span(self) -> int:
        """Return how many elements lie between the first and the end of the last."""
        if self.strides is None:
            return self.box.volume
        return _span(self.box.sizes, self.strides)


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor and the extents that tile it (none if it has no element)."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]


class ExtentSource(BoxReader[StoredTensor]):
    """See :class:`checkpoints.formats.source.Source`.

    Args:
        format_name: Name in the registry.
        path: What the user named: a file, or a directory.
        base: Directory that the extents' files are relative to.
        tensors: By canonical name.
        aliases: Name -> stored name.
        state: Everything that is not a tensor.
        ignored: What is not carried over.
        checksums: Of byte ranges that hold extents.

    Raises:
        IntegrityError: extents that do not tile their tensor (``E_GAP``,
            ``E_OVERLAP``), a file that is missing (``E_MISSING_FILE``), too short
            (``E_SIZE``) or outside the directory (``E_PATH``).
    """

    def __init__(
        self,
        format_name: str,
        path: Path,
        base: Path,
        tensors: Mapping[str, StoredTensor],
        *,
        aliases: Mapping[str, str] | None = None,
        state: Mapping[str, Json] | None = None,
        ignored: Sequence[Ignored] = (),
        checksums: Sequence[Checksum] = (),
    ) -> None:
        super().__init__(path, dict(tensors), dict(aliases or {}))
        self.format = format_name
        self.state: Mapping[str, Json] = dict(state or {})
        self.ignored: Sequence[Ignored] = tuple(ignored)
        self._base = base
        self._checksums = Checksums(checksums)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._scratch = bytearray()
        self._stream: Stream | None = None
        for alias, target in self.aliases.items():
            if alias in self._stored or target not in self._stored:
                raise IntegrityError(f"alias {alias!r} of {target!r}", code="E_ALIAS")
        try:
            self._check()
        except BaseException:
            self.close()
            raise

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
        while self._open:
            os.close(self._open.popitem()[1])

    def fork(self) -> Self:
        """Return a source of the same index, for another thread."""
        other = copy(self)
        other._open = OrderedDict()
        other._scratch = bytearray()
        other._stream = None
        return other

    @override
    def windows(self, name: str, window_bytes: int = WINDOW_BYTES) -> Iterator[Buffer]:
        """Yield a tensor's bytes; checksums are checked on the way, not before.

        A damaged range raises at its end at the latest, before the last window's
        successor: who takes windows keeps nothing of them until they ended.
        """
        stream = self._checksums.stream(self._read)
        inner = super().windows(name, window_bytes)
        while True:
            self._stream = stream
            try:
                window = next(inner, None)
            finally:
                self._stream = None
            if window is None:
                break
            yield window
        stream.finish()

    def boxes(self, name: str) -> Sequence[Box]:
        """Return the boxes in which a tensor is stored."""
        return [extent.box for extent in self.entry(name).extents]

    @override
    def _fill(self, entry: StoredTensor, box: Box, out: memoryview) -> None:
        item = item_bytes(entry.dtype)
        filled = 0
        for extent in entry.extents:
            part = intersect(extent.box, box)
            if part is None:
                continue
            filled += part.volume * item
            stream = self._stream
            if stream is None or extent.strides is not None:
                self._checksums.check(extent.file, extent.begin, self._read)
            if extent.strides is None or extent.strides == strides_of(extent.box.sizes):
                for run in runs(part, extent.box, box):
                    at, length = run.target * item, run.length * item
                    view = out[at : at + length]
                    begin = extent.begin + run.source * item
                    self._read(extent.file, begin, view)
                    if stream is not None:
                        stream.feed(extent.file, begin, view)
                continue
            for piece, first in dense_parts(part, extent, item):
                self._gather(extent, piece, first, box, out, item)
        assert filled == len(out)  # the extents tile the tensor: checked when opened

    def _gather(
        self,
        extent: Extent,
        part: Box,
        first: int,
        target: Box,
        out: memoryview,
        item: int,
    ) -> None:
        """Read the span of ``part`` in one go, and spread its elements."""
        strides = extent.strides or ()
        span = _span(part.sizes, strides) * item
        if len(self._scratch) < span:
            self._scratch = bytearray(span)
        data = memoryview(self._scratch)[:span]
        self._read(extent.file, extent.begin + first * item, data)
        steps = strides_of(target.sizes)
        offsets = zip(part.offsets, target.offsets, steps, strict=True)
        place = sum((at - base) * step for at, base, step in offsets)
        copy_strided(data, Grid(0, strides), out, Grid(place, steps), part.sizes, item)

    def _read(self, file: str, begin: int, out: memoryview) -> None:
        fd = self._descriptor(file)
        at = 0
        while at < len(out):
            try:
                count = os.preadv(fd, [out[at:]], begin + at)
            except OSError as exc:
                raise IntegrityError(
                    f"{file}: byte {begin + at}: {exc.strerror}", code="E_READ"
                ) from exc
            if count == 0:
                raise IntegrityError(f"{file}: ends at {begin + at}", code="E_SIZE")
            at += count

    def _descriptor(self, file: str) -> int:
        """Return an open descriptor; of many files, those used last stay open."""
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            return fd
        fd = self._open[file] = open_regular(self._base, file)
        if len(self._open) > MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _check(self) -> None:
        sizes: dict[str, int] = {}
        for name, entry in self._stored.items():
            _check_tiling(name, entry)
            item = item_bytes(entry.dtype)
            for extent in entry.extents:
                if extent.file not in sizes:
                    fd = self._descriptor(extent.file)
                    sizes[extent.file] = os.fstat(fd).st_size
                end = extent.begin + extent.span() * item
                if extent.begin < 0 or end > sizes[extent.file]:
                    raise IntegrityError(
                        f"{extent.file}: {sizes[extent.file]} B, but {name!r} is said "
                        f"to lie at {extent.begin}..{end}",
                        code="E_SIZE",
                        next_step="the file was cut or is another save's: fetch it "
                        "again, or use another copy",
                    )


def open_regular(base: Path, file: str) -> int:
    """Return a descriptor of the regular file ``file`` under ``base``.

    A symbolic link to a file is followed (download caches are made of them); a name
    that climbs out of the directory is refused.

    Raises:
        IntegrityError: ``E_PATH``, ``E_MISSING_FILE``.
    """
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or ".." in parts or "\0" in file:
        raise IntegrityError(
            f"file name {file[:200]!r} leaves the checkpoint's directory",
            code="E_PATH",
            next_step="do not use this checkpoint: its index is damaged or hostile",
        )
    path = base.joinpath(*parts)
    try:
        # O_NONBLOCK: a FIFO in the file's place must not hang us
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise IntegrityError(
            f"{path}: {exc.strerror}",
            code="E_MISSING_FILE",
            next_step="the checkpoint is not whole: fetch the file, or use another",
        ) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IntegrityError(f"{path} is no regular file", code="E_MISSING_FILE")
    return fd


def _check_tiling(name: str, entry: StoredTensor) -> None:
    boxes = [extent.box for extent in entry.extents]
    if not all(inside(box, entry.shape) and box.volume for box in boxes):
        raise IntegrityError(
            f"{name!r}: a part outside shape {list(entry.shape)}",
            code="E_BOUNDS",
            next_step="the index is damaged or hostile: use another copy",
        )
    fault = tiling_fault(entry.shape, boxes)
    if fault is not None:
        gap = fault.covered == 0
        raise IntegrityError(
            f"{name!r}: element {list(fault.at)} is stored {fault.covered} times",
            code="E_GAP" if gap else "E_OVERLAP",
            next_step="a rank's file is missing: fetch it"
            if gap
            else "files of two saves are mixed: use another copy",
        )
    for extent in entry.extents:
        if extent.strides is not None and (
            len(extent.strides) != len(entry.shape)
            or min(extent.strides, default=0) < 0
        ):
            raise IntegrityError(f"{name!r}: strides {extent.strides}", code="E_BOUNDS")


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    steps = zip(sizes, strides, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def dense_parts(part: Box, extent: Extent, item: int) -> Iterator[tuple[Box, int]]:
    """Cut a part of a strided extent until little of what is read is not wanted.

    Args:
        part: Not empty, in the tensor's coordinates.
        extent: Has strides, and holds ``part``.
        item: Bytes of an element.

    Yields:
        A part, and its first element's place in the extent. What lies between its
        elements is at most as much as they are, or :data:`SMALL_SPAN_BYTES`.
    """
    strides = extent.strides or ()
    todo = [part]
    while todo:
        box = todo.pop()
        span = _span(box.sizes, strides) * item
        wanted = min(SPAN_BYTES, 2 * box.volume * item)
        if span <= max(SMALL_SPAN_BYTES, wanted) or box.volume == 1:
            steps = zip(box.offsets, extent.box.offsets, strides, strict=True)
            yield box, sum((at - base) * stride for at, base, stride in steps)
            continue
        reach = [(n - 1) * stride for n, stride in zip(box.sizes, strides, strict=True)]
        dim = reach.index(max(reach))
        half = box.sizes[dim] // 2
        for begin, end in ((half, box.sizes[dim]), (0, half)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += begin
            sizes[dim] = end - begin
            todo.append(Box(tuple(offsets), tuple(sizes)))
