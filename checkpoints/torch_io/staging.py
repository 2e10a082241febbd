"""The one copy that a save stalls training for: into memory that is used again.

The memory holds the files as they will lie on the disk. It keeps its content until the
next save, so that a tensor can be compared with what was saved of it last: bytes that
did not change are neither copied nor written again.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from checkpoints.boxes import Box
from checkpoints.part_layout import PAGE_BYTES, FileLayout

SAMPLE_BYTES = 4096
"""Compared first: what trains differs there, and is copied without a second look."""

ViewOf = Callable[[str, Box], torch.Tensor]
"""Returns the elements of a box of a tensor."""


class StagedFile(NamedTuple):
    """A file in memory.

    Attributes:
        layout: Name, places of chunks, size.
        image: Its bytes.
        padded: The same memory up to whole pages.
        unchanged: These are the bytes of the last save.
    """

    layout: FileLayout
    image: memoryview
    padded: memoryview
    unchanged: bool


class Staged(NamedTuple):
    """The files in memory.

    Attributes:
        files: In the order of their layouts.
        compared: The last save had the same files, and was compared with.
        unchanged: Tensors of which no byte changed since then.
    """

    files: list[StagedFile]
    compared: bool
    unchanged: set[str]


class Stager:
    """Memory for one save at a time, grown when needed and never shrunk.

    Args:
        compare: Look for bytes that did not change.
    """

    def __init__(self, *, compare: bool = True) -> None:
        self._compare = compare
        self._memory: mmap.mmap | None = None
        self._layouts: Sequence[FileLayout] = ()

    @property
    def size(self) -> int:
        """Bytes of memory held."""
        return len(self._memory) if self._memory is not None else 0

    def forget(self) -> None:
        """Compare nothing with what is staged now: it was not saved."""
        self._layouts = ()

    def stage(self, layouts: Sequence[FileLayout], view_of: ViewOf) -> Staged:
        """Copy all chunks; returns when the tensors may change again.

        Args:
            layouts: All files of this save.
            view_of: Where the elements are now.
        """
        known = self._compare and bool(layouts) and layouts == self._layouts
        self._layouts = ()  # what is there is half of each until we are done
        memory = self._grown(sum(_pages(layout.size) for layout in layouts))
        files = []
        changed: set[str] = set()
        at = 0
        for layout in layouts:
            end = at + _pages(layout.size)
            view = memoryview(memory)[at:end]
            if not known:
                view[: len(layout.prefix)] = layout.prefix
            differ = _fill(view, layout, view_of, known=known)
            changed |= differ
            still = known and not differ
            files.append(StagedFile(layout, view[: layout.size], view, still))
            at = end
        names = {c.plan.name for layout in layouts for c in layout.chunks}
        self._layouts = layouts
        return Staged(files, known, names - changed if known else set())

    def _grown(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            self._memory = None  # give the old back first
            memory = mmap.mmap(-1, max(size, PAGE_BYTES))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory = memory
        return self._memory


def _fill(
    image: memoryview, layout: FileLayout, view_of: ViewOf, *, known: bool
) -> set[str]:
    """Copy what differs; return the names of what did."""
    changed = set()
    for plan, begin, end in layout.chunks:
        source = view_of(plan.name, plan.box)
        target = torch.frombuffer(image[begin:end], dtype=torch.uint8)
        if not (known and _same(target, source)):
            changed.add(plan.name)
            target.view(source.dtype).view(source.shape).copy_(source)
    return changed


def _same(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Return whether ``source`` has the bytes of ``target``; no if it is elsewhere."""
    if source.device.type != "cpu" or not source.is_contiguous() or _lazy(source):
        return False
    found = source.reshape(-1).view(torch.uint8)
    if not torch.equal(target[:SAMPLE_BYTES], found[:SAMPLE_BYTES]):
        return False
    if not torch.equal(target[-SAMPLE_BYTES:], found[-SAMPLE_BYTES:]):
        return False
    return torch.equal(_wide(target), _wide(found))


def _lazy(source: torch.Tensor) -> bool:
    """Return whether the bytes are not yet those of the elements."""
    return source.is_conj() or source.is_neg()


def _wide(data: torch.Tensor) -> torch.Tensor:
    """Return the same bytes as integers, not floats: a NaN equals itself."""
    if data.numel() % 8 == 0 and data.data_ptr() % 8 == 0:
        return data.view(torch.int64)
    return data


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES
