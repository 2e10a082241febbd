"""Whole safetensors files: stream tensors out of one, and write a new one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from blake3 import blake3

from checkpoints.hashed_file import Buffer
from checkpoints.parts import WINDOW_BYTES
from checkpoints.safetensors_io import Header, NewTensor, layout, read_header_untrusted
from fabric.core.errors import IntegrityError


class SafetensorsFile:
    """A safetensors file of any writer, open for reading.

    Raises:
        IntegrityError: it is not one.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        with ExitStack() as undo:
            undo.callback(self._file.close)
            self.header: Header = read_header_untrusted(self._file)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def windows(self, name: str) -> Iterator[Buffer]:
        """Yield a tensor's bytes; each buffer is overwritten by the next."""
        begin, end = self.header.tensors[name].data_offsets
        buffer = memoryview(bytearray(min(WINDOW_BYTES, end - begin)))
        at = self.header.data_begin + begin
        stop = self.header.data_begin + end
        while at < stop:
            count = os.preadv(self._file.fileno(), [buffer[: stop - at]], at)
            if count == 0:
                raise IntegrityError(f"{self._path}: ends at byte {at}", code="E_SIZE")
            yield buffer[:count]
            at += count


class TensorStream(msgspec.Struct, frozen=True):
    """A tensor to be written, and how to read its bytes once."""

    new: NewTensor
    read: Callable[[], Iterable[Buffer]]


def write_safetensors(
    path: Path, streams: Sequence[TensorStream], metadata: Mapping[str, str]
) -> None:
    """Write and sync a new file from ``streams``, one window in memory at a time."""
    by_name = {stream.new.name: stream for stream in streams}
    prefix, order, header = layout([stream.new for stream in streams], metadata)
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), prefix)
        for tensor in order:
            for window in by_name[tensor.name].read():
                write_all(file.fileno(), window)
            end = header.data_begin + header.tensors[tensor.name].data_offsets[1]
            if file.tell() != end:
                raise ValueError(f"{tensor.name!r}: source of another size")
        os.fsync(file.fileno())


def write_all(fd: int, data: Buffer) -> None:
    """Write all of ``data`` to ``fd``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def hash_windows(windows: Iterable[Buffer]) -> str:
    """Return the BLAKE3 of the bytes in ``windows``, as hex."""
    hasher = blake3()
    for window in windows:
        hasher.update(window)
    return hasher.hexdigest()
