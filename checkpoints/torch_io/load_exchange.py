"""Each block read by one rank of a site, and passed on to the others that need it.

All ranks say which windows they need; each window that several need is read and
verified by one of them, the one with the fewest bytes so far. They go through the
windows in the same order, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from checkpoints.load_plan import WINDOW_BYTES, Window
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.exchange import Exchange, Parcel, bodies, done, failed
from checkpoints.torch_io.tensors import byte_view
from checkpoints.torch_io.window_reads import WindowReads, spans
from checkpoints.verified_file import VerifiedFile
from fabric.core.errors import FabricError

WINDOWS_AT_ONCE = 32
"""Windows in flight: 128 MiB of memory on a rank that needs all of them."""

Place = tuple[str, int]
"""File and number of a window."""


class _Read(NamedTuple):
    """A window that somebody reads: blocks that anybody needs, who, and for whom."""

    window: Window
    owner: int
    needers: list[int]


def read_exchanged(
    reader: CheckpointReader,
    reads: WindowReads,
    windows: Sequence[Window],
    exchange: Exchange,
    threads: int = 0,
) -> int:
    """Fill this rank's buffers; return how many windows this rank read.

    Args:
        reader: The open checkpoint.
        reads: Knows the buffers.
        windows: What this rank needs.
        exchange: The ranks that read together; all of them call.
        threads: Of this rank.

    Raises:
        FabricError: a rank cannot read: the same on every rank.
    """
    mine = {(w.file, w.number): w for w in windows}
    masks = [(w.file, w.number, w.mask) for w in windows]
    told = bodies(exchange.all_gather(done(msgspec.msgpack.encode(masks))))
    needs = [msgspec.msgpack.decode(t, type=list[tuple[str, int, int]]) for t in told]
    plan = assign_reads(needs)
    size_of = {name: file.size for name, file in reader.manifest.files.items()}
    count = 0
    with ThreadPoolExecutor(threads or 2, thread_name_prefix="load") as pool:
        for first in range(0, len(plan), WINDOWS_AT_ONCE):
            batch = plan[first : first + WINDOWS_AT_ONCE]
            own = [each for each in batch if each.owner == exchange.rank]
            count += len(own)
            data: dict[Place, torch.Tensor] = {}
            try:
                files = {e.window.file: reader.file(e.window.file) for e in own}
                found = pool.map(partial(_read, files, size_of), own)
                for each, read in zip(own, found, strict=True):
                    data[each.window.file, each.window.number] = read
                outcome = done()
            except FabricError as exc:
                outcome = failed(exc)
            bodies(exchange.all_gather(outcome))
            _pass_on(batch, data, exchange, size_of)
            for place, read in data.items():
                if place in mine:
                    reads.deliver(mine[place], read)
    return count


def assign_reads(needs: Sequence[Sequence[tuple[str, int, int]]]) -> list[_Read]:
    """Return who reads what, the same on every rank: worst fit among those who need it.

    Args:
        needs: By rank: file, number and mask of each window.
    """
    masks: dict[Place, int] = {}
    needers: dict[Place, list[int]] = {}
    for rank, wanted in enumerate(needs):
        for file, number, mask in wanted:
            masks[file, number] = masks.get((file, number), 0) | mask
            needers.setdefault((file, number), []).append(rank)
    load = [0] * len(needs)
    plan = []
    for (file, number), mask in sorted(masks.items()):
        ranks = needers[file, number]
        owner = min(ranks, key=lambda rank: (load[rank], rank))
        load[owner] += mask.bit_count()
        plan.append(_Read(Window(file, number, mask, ()), owner, ranks))
    return plan


def _read(
    files: Mapping[str, VerifiedFile], size_of: Mapping[str, int], each: _Read
) -> torch.Tensor:
    """Return a window's bytes from its begin on; blocks not needed are undefined."""
    window = each.window
    data = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
    for span in spans(window, size_of[window.file]):
        part = data[span.begin - window.begin : span.end - window.begin]
        files[window.file].read_blocks(span.block, [byte_view(part)])
    return data


def _pass_on(
    batch: Sequence[_Read],
    data: dict[Place, torch.Tensor],
    exchange: Exchange,
    size_of: Mapping[str, int],
) -> None:
    """Send what we read, and add to ``data`` what others read for us."""
    sends: list[Parcel] = []
    receives: list[Parcel] = []
    for number, each in enumerate(batch):
        place = (each.window.file, each.window.number)
        parts = spans(each.window, size_of[each.window.file])
        low = parts[0].begin - each.window.begin
        high = parts[-1].end - each.window.begin
        if each.owner == exchange.rank:
            part = data[place][low:high]
            sends += [
                Parcel(rank, number, part)
                for rank in each.needers
                if rank != exchange.rank
            ]
        elif exchange.rank in each.needers:
            data[place] = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
            receives.append(Parcel(each.owner, number, data[place][low:high]))
    exchange.swap(sends, receives)
