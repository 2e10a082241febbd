"""Read windows into tensors: straight where bytes lie as wanted, else by one copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import gcd
from threading import local
from typing import NamedTuple

import torch

from checkpoints.load_plan import WINDOW_BYTES, Runs, Window, block_runs
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.tensors import byte_view
from checkpoints.verified_file import VerifiedFile
from fabric.core.digest import BLOCK_BYTES

MAX_PARTS = 256
"""Above this many pieces of one read, one copy costs less."""
_WIDE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class _Span(NamedTuple):
    """Blocks of a window that follow each other: file offsets, first block."""

    begin: int
    end: int
    block: int


class WindowReads:
    """Reads of one checkpoint into buffers, by several threads.

    Args:
        reader: The open checkpoint.
        buffers: 1-D uint8 CPU tensors, by target number.
        threads: 0 = one per processor, at most four.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        buffers: Sequence[torch.Tensor],
        threads: int = 0,
    ) -> None:
        self._reader = reader
        self._buffers = buffers
        self._views = [byte_view(buffer) for buffer in buffers]
        self._threads = threads or min(4, os.cpu_count() or 1)
        self._scratch = local()

    def run(self, windows: Sequence[Window]) -> None:
        """Read and verify ``windows``, and copy what is wanted of them.

        Raises:
            IntegrityError: a block is damaged, a file is missing or short; the buffers
                are then undefined.
        """
        files = {name: self._reader.file(name) for name in {w.file for w in windows}}
        if self._threads == 1 or len(windows) < 2:
            for window in windows:
                self._window(files[window.file], window)
            return
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="load")
        try:
            reads = [pool.submit(self._window, files[w.file], w) for w in windows]
            for read in reads:
                read.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def deliver(self, window: Window, data: torch.Tensor) -> None:
        """Copy what is wanted of a window whose bytes are in ``data``."""
        for runs in window.runs:
            copy_runs(data, window.begin, self._buffers[runs.target], runs)

    def _window(self, file: VerifiedFile, window: Window) -> None:
        for span in spans(window, self._reader.manifest.files[window.file].size):
            runs = [r for r in window.runs if span.begin <= r.source < span.end]
            if _follow(runs):
                file.read_blocks(span.block, self._parts(span, runs))
                continue
            data = self._space()[: span.end - span.begin]
            file.read_blocks(span.block, [byte_view(data)])
            for each in runs:
                copy_runs(data, span.begin, self._buffers[each.target], each)

    def _parts(self, span: _Span, runs: Sequence[Runs]) -> list[memoryview]:
        """Return where the bytes of a span go: destinations, and room for the rest."""
        spare = byte_view(self._space())
        parts = []
        at = span.begin
        for each in runs:
            parts.append(spare[at - span.begin : each.source - span.begin])
            parts.append(self._views[each.target][each.at : each.at + each.length])
            at = each.source + each.length
        parts.append(spare[at - span.begin : span.end - span.begin])
        return parts

    def _space(self) -> torch.Tensor:
        if not hasattr(self._scratch, "space"):
            self._scratch.space = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
        space: torch.Tensor = self._scratch.space
        return space


def spans(window: Window, size: int) -> list[_Span]:
    """Return the runs of needed blocks of a window, in a file of ``size`` bytes."""
    out = []
    for first, end in block_runs(window.mask):
        begin = window.begin + first * BLOCK_BYTES
        stop = min(window.begin + end * BLOCK_BYTES, size)
        out.append(_Span(begin, stop, begin // BLOCK_BYTES))
    return out


def _follow(runs: Sequence[Runs]) -> bool:
    """Return whether each byte is wanted once at most, in few pieces."""
    return (
        len(runs) <= MAX_PARTS
        and all(each.repeats == 1 for each in runs)
        and all(a.source + a.length <= b.source for a, b in pairwise(runs))
    )


def copy_runs(data: torch.Tensor, begin: int, buffer: torch.Tensor, runs: Runs) -> None:
    """Copy ``runs`` from the file's bytes at ``begin`` into a buffer."""
    at = runs.source - begin
    if runs.repeats == 1:
        buffer[runs.at : runs.at + runs.length] = data[at : at + runs.length]
        return
    places = (at, runs.source_step, runs.at, runs.at_step, runs.length)
    width = gcd(8, *places, data.data_ptr(), buffer.data_ptr())
    source, target = (
        _wide(tensor, width).as_strided(
            (runs.repeats, runs.length // width), (step // width, 1), first // width
        )
        for tensor, first, step in (
            (data, at, runs.source_step),
            (buffer, runs.at, runs.at_step),
        )
    )
    target.copy_(source)


def _wide(data: torch.Tensor, width: int) -> torch.Tensor:
    """Return the bytes as elements of ``width``, from the first on."""
    whole = data.numel() // width * width
    return torch.frombuffer(byte_view(data)[:whole], dtype=_WIDE[width])
