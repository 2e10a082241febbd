"""Write pickles of protocol 2 that other programs read: plain data and named calls."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import msgspec

from checkpoints.formats.pickle_values import Global


class Call(msgspec.Struct, frozen=True):
    """What the reader makes by calling ``target``."""

    target: Global
    args: tuple[object, ...]


class Instance(msgspec.Struct, frozen=True):
    """What the reader makes of class ``target``, and gives these attributes."""

    target: Global
    state: object


class Pairs(msgspec.Struct, frozen=True):
    """A dictionary whose keys the reader makes."""

    pairs: list[tuple[object, object]]


class Persistent(msgspec.Struct, frozen=True):
    """What the reader gets elsewhere, by this identity."""

    identity: tuple[object, ...]


def pickled(value: object) -> bytes:
    """Return the pickle of ``value``.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict, :class:`Global`,
            and the types above, of any nesting.

    Raises:
        TypeError: something else is in it.
    """
    writer = _Writer()
    writer.write(value)
    return b"".join([b"\x80\x02", *writer.parts, b"."])


class _Writer:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._memo: dict[object, int] = {}  # names and short texts: most of an index

    def write(self, value: object) -> None:
        if isinstance(value, Global):
            self._remembered(value, f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, str):
            data = value.encode()
            self._remembered(value, b"X" + struct.pack("<I", len(data)) + data)
        elif isinstance(value, bool) or value is None:
            self.parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.parts.append(_integer(value))
        elif isinstance(value, float):
            self.parts.append(struct.pack(">cd", b"G", value))
        elif isinstance(value, tuple | list | Mapping):
            self._container(value)
        else:
            self._object(value)

    def _remembered(self, value: object, code: bytes) -> None:
        known = self._memo.get(value)
        if known is not None:
            self.parts.append(b"j" + struct.pack("<I", known))
            return
        number = self._memo[value] = len(self._memo)
        self.parts += [code, b"r", struct.pack("<I", number)]

    def _container(
        self, value: tuple[object, ...] | list[object] | Mapping[object, object]
    ) -> None:
        if isinstance(value, tuple):
            self._sequence(b"(", value, b"t")
        elif isinstance(value, list):
            self._sequence(b"](", value, b"e")
        else:
            self._pairs(value.items())

    def _pairs(self, pairs: Iterable[tuple[object, object]]) -> None:
        self._sequence(b"}(", [part for pair in pairs for part in pair], b"u")

    def _sequence(
        self, before: bytes, values: tuple[object, ...] | list[object], after: bytes
    ) -> None:
        self.parts.append(before)
        for value in values:
            self.write(value)
        self.parts.append(after)

    def _object(self, value: object) -> None:
        if isinstance(value, bytes):  # protocol 2 has none: as Python's own writer does
            codec = Global("_codecs", "encode")
            value = Call(codec, (value.decode("latin-1"), "latin1"))
        if isinstance(value, Call):
            self.write(value.target)
            self.write(value.args)
            self.parts.append(b"R")
        elif isinstance(value, Instance):
            self.write(value.target)
            self.parts.append(b")\x81")
            self.write(value.state)
            self.parts.append(b"b")
        elif isinstance(value, Pairs):
            self._pairs(value.pairs)
        elif isinstance(value, Persistent):
            self.write(value.identity)
            self.parts.append(b"Q")
        else:
            raise TypeError(f"{type(value).__name__} in a pickle")


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return bytes((ord("K"), value))
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return bytes((0x8A, size)) + value.to_bytes(size, "little", signed=True)
