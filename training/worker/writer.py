"""Writes states beside the training loop: checkpoints, and copies in shared memory.

A state is never changed once it is held, so it is written from where it lies: saving
copies nothing and stops nothing but for the processor time it takes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fabric.core.errors import FabricError
from fabric.jobs.spec import JobSpec
from training.messages import Event, HotFailed, HotWritten, Saved, SaveFailed
from training.worker.engines.interface import Engine
from training.worker.outer import OuterState
from training.worker.save import save_checkpoint

MAX_WAITING = 8
"""Orders that wait; the daemon gives one of each kind at a time."""
WRITE_BYTES = 8 << 20
"""One write: the thread lets go of a full pipe's worth at a time."""


@dataclass(frozen=True)
class SaveOrder:
    """Write ``state`` as a checkpoint under ``directory``."""

    directory: Path
    state: OuterState


@dataclass(frozen=True)
class HotOrder:
    """Write ``data``, a state called ``digest``, into the file ``fd``; closes it."""

    digest: str
    data: memoryview
    fd: int


Order = SaveOrder | HotOrder


class StateWriter:
    """One thread that writes what it is given, in order.

    Args:
        spec: Recorded in checkpoints.
        engine: Knows the names and shapes.
        tell: Sends an event to the daemon; callable from any thread.
    """

    def __init__(
        self, spec: JobSpec, engine: Engine, tell: Callable[[Event], None]
    ) -> None:
        self._spec, self._engine, self._tell = spec, engine, tell
        self._orders: queue.Queue[Order] = queue.Queue(MAX_WAITING)
        threading.Thread(target=self._run, daemon=True, name="writer").start()

    def put(self, order: Order) -> None:
        """Write ``order`` soon; say at once that it failed when too many wait."""
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            self._tell(_refused(order, "E_BUSY", "too many states wait to be written"))
            if isinstance(order, HotOrder):
                os.close(order.fd)

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            try:
                event = self._write(order)
            except FabricError as exc:
                event = _refused(order, exc.code, exc.reason)
            except OSError as exc:
                event = _refused(order, "E_DISK", str(exc))
            self._tell(event)

    def _write(self, order: Order) -> Event:
        match order:
            case SaveOrder(directory, state):
                saved = save_checkpoint(directory, self._spec, self._engine, state)
                return Saved(saved.path, saved.root, state.round, saved.size_bytes)
            case HotOrder(digest, data, fd):
                try:
                    write_all(fd, data)
                finally:
                    os.close(fd)
                return HotWritten(digest)


def write_all(fd: int, data: memoryview) -> None:
    """Write all of ``data`` at the file's position."""
    while data:
        data = data[os.write(fd, data[:WRITE_BYTES]) :]


def read_all(fd: int, size: int) -> bytearray:
    """Return ``size`` bytes from the start of the file, fewer if it ends before."""
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = os.preadv(fd, [view[at:]], at)
        if not got:
            break
        at += got
    view.release()
    del data[at:]
    return data


def _refused(order: Order, code: str, reason: str) -> Event:
    match order:
        case SaveOrder(directory):
            return SaveFailed(str(directory), code, reason[:500])
        case HotOrder(digest):
            return HotFailed(digest, reason[:500])
