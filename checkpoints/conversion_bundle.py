"""What is to be written, as readers of the source that several threads can use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import msgspec
from blake3 import blake3

from checkpoints.boxes import Box, whole
from checkpoints.casting import can_cast, cast_windows
from checkpoints.dtypes import item_bytes
from checkpoints.formats.sink import Bundle, OutTensor
from checkpoints.formats.source import MODEL, Source
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import Json
from checkpoints.mapping import Mapped
from checkpoints.progress import Progress
from checkpoints.views import Piece, View, ViewReader
from fabric.core.errors import FabricError, IntegrityError


class HashedBox(msgspec.Struct, frozen=True):
    """A box of a tensor of the target, and the hash of its bytes, row-major."""

    name: str
    box: Box
    blake3: str


class Stopped(FabricError):
    """Another thread failed: its error is the one to tell."""

    default_code = "E_STOPPED"


class ReaderPool:
    """One reader of a source for each thread."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._local = threading.local()
        self._lock = threading.Lock()
        self._forks: list[Source] = []

    def reader(self) -> ViewReader:
        """Return this thread's reader."""
        return self._own()[1]

    def source(self) -> Source:
        """Return this thread's source."""
        return self._own()[0]

    def close(self) -> None:
        """Close the files of all threads."""
        for fork in self._forks:
            fork.close()

    def _own(self) -> tuple[Source, ViewReader]:
        found: tuple[Source, ViewReader] | None = getattr(self._local, "own", None)
        if found is None:
            with self._lock:
                fork = self._source.fork()
                self._forks.append(fork)
            found = self._local.own = (fork, ViewReader(fork))
        return found


class Meter:
    """Hashes what streams by, for the file that the thread writes; counts; stops.

    Args:
        on_progress: Told how far it is, by one thread at a time.
    """

    def __init__(self, on_progress: Progress) -> None:
        self.stop = threading.Event()
        self._total = 0
        self._done = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._local = threading.local()

    def begin(self, total: int, done: int) -> None:
        """Count from ``done``; ``total`` bytes will pass in all."""
        self._total, self._done = total, done

    def begin_file(self) -> None:
        """Forget what this thread hashed before."""
        self._local.hashed = {}

    def hashed(self) -> list[HashedBox]:
        """Return what this thread hashed since."""
        found: dict[tuple[str, Box], str] = self._local.hashed
        return [HashedBox(name, box, value) for (name, box), value in found.items()]

    def tee(self, name: str, box: Box, windows: Iterable[Buffer]) -> Iterator[Buffer]:
        """Yield ``windows``, recording the hash of all of them."""
        hasher = blake3()
        for window in windows:
            hasher.update(window)
            self.advance(len(window))
            yield window
        hashed = getattr(self._local, "hashed", None)
        if hashed is not None:
            hashed[name, box] = hasher.hexdigest()

    def advance(self, count: int) -> None:
        """Count bytes.

        Raises:
            Stopped: another thread failed.
        """
        if self.stop.is_set():
            raise Stopped("stopped")
        with self._lock:
            self._done = min(self._done + count, self._total)
            if self._total:
                self._on_progress(self._done, self._total)


def make_bundle(
    source: Source,
    mapped: Mapped,
    state: Mapping[str, Json],
    pool: ReaderPool,
    meter: Meter,
    *,
    window_bytes: int,
    turned_bytes: int,
    dtype: str,
) -> Bundle:
    """Return what ``mapped`` says, to be read through ``pool``.

    Args:
        source: What the views are of.
        mapped: The target's tensors.
        state: Everything that is not a tensor.
        pool: Of ``source``.
        meter: Hashes what is read.
        window_bytes: Of one buffer.
        turned_bytes: The same, of a turned tensor.
        dtype: Type to which the model's floats are cast, or empty.
    """
    aliases = _aliases(source, mapped)
    tensors = {}
    for name, view in mapped.views.items():
        if name in aliases:
            continue
        cast = name.startswith(MODEL) and bool(dtype) and can_cast(view.dtype, dtype)
        to = dtype if cast else view.dtype
        size = turned_bytes if view.turned else window_bytes
        read = partial(_read, name, view, to, pool, meter, size)
        tensors[name] = OutTensor(
            name, to, view.shape, partial(read, whole(view.shape)), read
        )
    return Bundle(tensors, aliases, state)


def _read(
    name: str,
    view: View,
    dtype: str,
    pool: ReaderPool,
    meter: Meter,
    window_bytes: int,
    box: Box,
) -> Iterator[Buffer]:
    size = window_bytes
    if dtype != view.dtype:
        # the cast holds several copies, the wider ones of 8 bytes an element
        size = max(1 << 16, window_bytes * item_bytes(view.dtype) // 32)
    windows = _named(name, pool.reader().windows(view, box, size))
    if dtype != view.dtype:
        windows = cast_windows(name, windows, view.dtype, dtype)
    return meter.tee(name, box, windows)


def _named(name: str, windows: Iterator[Buffer]) -> Iterator[Buffer]:
    """Yield ``windows``; damage below them is told with the tensor's name."""
    try:
        yield from windows
    except IntegrityError as error:
        raise IntegrityError(
            f"{name!r}: {error.reason}", code=error.code, next_step=error.next_step
        ) from error


def _aliases(source: Source, mapped: Mapped) -> dict[str, str]:
    """Return the names of the target that are tied as they are in the source."""
    if not source.aliases:
        return {}
    resolve: Callable[[Piece], Piece] = lambda piece: msgspec.structs.replace(  # noqa: E731
        piece, source=source.aliases.get(piece.source, piece.source)
    )
    stored: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}

    def is_alias(name: str) -> bool:
        return any(p.source in source.aliases for p in mapped.views[name].pieces)

    for name in sorted(mapped.views, key=lambda each: (is_alias(each), each)):
        view = mapped.views[name]
        content = (view.dtype, view.shape, tuple(map(resolve, view.pieces)))
        if is_alias(name) and content in stored:
            tied[name] = stored[content]
        else:
            stored.setdefault(content, name)
    return tied
