"""Which blocks of which files hold the wanted boxes, and where their bytes go.

The unit of reading is a window: at most four blocks of a file at a fixed place (a
multiple of 4 MiB), of which only those blocks are read that hold a wanted byte. What is
copied out of a window is a regular set of runs, so that a slice of columns costs a few
entries, not one for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from checkpoints.boxes import Box, intersect, strides_of
from checkpoints.dtypes import item_bytes
from checkpoints.manifest import TensorEntry
from fabric.core.digest import BLOCK_BYTES

WINDOW_BLOCKS = 4
WINDOW_BYTES = WINDOW_BLOCKS * BLOCK_BYTES


class Runs(NamedTuple):
    """``repeats`` runs of ``length`` bytes each, from a file into a buffer.

    Attributes:
        target: Which buffer.
        source: File offset of the first run.
        source_step: Bytes from one run to the next in the file.
        at: Offset of the first run in the buffer.
        at_step: Bytes from one run to the next in the buffer.
        repeats: Number of runs.
        length: Bytes of each.
    """

    target: int
    source: int
    source_step: int
    at: int
    at_step: int
    repeats: int
    length: int

    def some(self, first: int, count: int) -> Runs:
        """Return ``count`` of the runs, from number ``first`` on."""
        return self._replace(
            source=self.source + first * self.source_step,
            at=self.at + first * self.at_step,
            repeats=count,
        )

    def cut(self, begin: int, end: int) -> Runs:
        """Return the first run's bytes that lie at ``begin <= offset < end``."""
        low = max(begin, self.source)
        high = min(end, self.source + self.length)
        return self._replace(
            source=low, at=self.at + low - self.source, repeats=1, length=high - low
        )


class Window(NamedTuple):
    """One read: the blocks of a window that are needed, and what is copied from them.

    Attributes:
        file: Name of the file.
        number: Its bytes begin at ``number`` * 4 MiB.
        mask: Bit k: block k of the window is needed.
        runs: Each lies in the needed blocks.
    """

    file: str
    number: int
    mask: int
    runs: tuple[Runs, ...]

    @property
    def begin(self) -> int:
        """File offset of the window."""
        return self.number * WINDOW_BYTES


class Want(NamedTuple):
    """A box of a stored tensor, to fill buffer number ``target`` row-major."""

    entry: TensorEntry
    box: Box
    target: int


def plan_load(wants: Iterable[Want]) -> list[Window]:
    """Return the windows to read, by file and place.

    Args:
        wants: Boxes inside their tensors.
    """
    found: dict[tuple[str, int], tuple[int, list[Runs]]] = {}
    for want in wants:
        for chunk in want.entry.chunks:
            part = intersect(chunk.box, want.box)
            if part is None:
                continue
            item = item_bytes(want.entry.dtype)
            for runs in _runs(part, chunk.box, want, item, chunk.begin):
                for number, mask, cut in _windows(runs):
                    known, others = found.get((chunk.file, number), (0, []))
                    found[chunk.file, number] = (known | mask, others)
                    others.append(cut)
    return [
        Window(file, number, mask, tuple(sorted(runs, key=lambda r: r.source)))
        for (file, number), (mask, runs) in sorted(found.items())
    ]


def _runs(part: Box, source: Box, want: Want, item: int, begin: int) -> Iterator[Runs]:
    """Yield the runs of ``part``, in bytes: regular in the last dim that is cut."""
    target = want.box
    inner = len(part.sizes)
    length = item
    while inner > 0:
        inner -= 1
        length *= part.sizes[inner]
        if not part.sizes[inner] == source.sizes[inner] == target.sizes[inner]:
            break
    steps = [[s * item for s in strides_of(box.sizes)] for box in (source, target)]
    firsts = [
        sum(
            (mine - base) * step
            for mine, base, step in zip(part.offsets, box.offsets, by, strict=True)
        )
        for box, by in zip((source, target), steps, strict=True)
    ]
    last = inner - 1
    count = part.sizes[last] if inner else 1
    by_source, by_target = (by[last] if inner else 0 for by in steps)
    outer = [range(part.sizes[dim]) for dim in range(max(0, last))]
    for index in product(*outer):
        at, to = (
            first + sum(k * step for k, step in zip(index, by, strict=False))
            for first, by in zip(firsts, steps, strict=True)
        )
        runs = Runs(want.target, begin + at, by_source, to, by_target, count, length)
        if count > 1 and by_source > BLOCK_BYTES:
            yield from (runs.some(k, 1) for k in range(count))
        else:
            yield runs


def _windows(runs: Runs) -> Iterator[tuple[int, int, Runs]]:
    """Yield window number, mask of blocks, and runs, for all windows that are met."""
    end = runs.source + (runs.repeats - 1) * runs.source_step + runs.length
    for number in range(runs.source // WINDOW_BYTES, -(-end // WINDOW_BYTES)):
        begin = number * WINDOW_BYTES
        for cut in _inside(runs, begin, begin + WINDOW_BYTES):
            yield number, _mask(cut, begin), cut


def _inside(runs: Runs, begin: int, end: int) -> Iterator[Runs]:
    """Yield what of ``runs`` lies at ``begin <= offset < end``."""
    if runs.repeats == 1:
        yield runs.cut(begin, end)
        return
    step = runs.source_step
    first = max(0, -((runs.source - begin) // step))
    last = min(runs.repeats, (end - runs.length - runs.source) // step + 1)
    if first < last:
        yield runs.some(first, last - first)
    for number in {first - 1, max(first, last)}:
        if 0 <= number < runs.repeats:
            run = runs.some(number, 1)
            if run.source < end and run.source + run.length > begin:
                yield run.cut(begin, end)


def _mask(runs: Runs, begin: int) -> int:
    first = (runs.source - begin) // BLOCK_BYTES
    end = runs.source + (runs.repeats - 1) * runs.source_step + runs.length - begin
    return ((1 << -(-end // BLOCK_BYTES)) - 1) & ~((1 << first) - 1)


def block_runs(mask: int) -> Iterator[tuple[int, int]]:
    """Yield first and end of each run of needed blocks in a window."""
    block = 0
    while mask >> block:
        if not mask >> block & 1:
            block += 1
            continue
        first = block
        while mask >> block & 1:
            block += 1
        yield first, block


def read_bytes(windows: Sequence[Window], sizes: Mapping[str, int]) -> int:
    """Return how many bytes are read, given the sizes of the files."""
    total = 0
    for window in windows:
        for first, end in block_runs(window.mask):
            begin = window.begin + first * BLOCK_BYTES
            last = window.begin + end * BLOCK_BYTES
            total += min(last, sizes[window.file]) - begin
    return total
