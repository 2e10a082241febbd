"""What passes on a one-way connection: heads with pieces forward, short words back.

    forward   kind 1 | tag 4 | sequence 8 | value 4 | length 4, then length bytes
    back      kind 1 | value 4

Big-endian. A piece is at most PIECE_BYTES, so there is a gap for a beat or an abort
between any two. ``tag`` says what both ends believe to be doing: a rank that runs
another collective, or another size, is found at once.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from fabric.core.errors import RemoteProtocolError
from training.worker.collectives.choose import PIECE_BYTES

_HEAD = struct.Struct(">BIQII")
_WORD = struct.Struct(">BI")
HEAD_BYTES = _HEAD.size
WORD_BYTES = _WORD.size
NOBODY = 0xFFFFFFFF
"""The rank in an abort that blames nobody."""


class Kind(IntEnum):
    """What a head or a word says."""

    BEAT = 0
    """Alive, nothing to say."""
    PIECE = 1
    """``length`` bytes follow."""
    SLOT = 2
    """``length`` bytes lie in slot ``value`` of the shared memory."""
    ABORT = 3
    """The group is over because of rank ``value``."""
    BYE = 4
    """An orderly end."""
    FREE = 5
    """Back only: slot ``value`` may be used again."""


@dataclass(frozen=True, slots=True)
class Head:
    """One head; see the picture above."""

    kind: Kind
    tag: int = 0
    sequence: int = 0
    value: int = 0
    length: int = 0

    def encode(self) -> bytes:
        """Return the head as it goes on the wire."""
        return _HEAD.pack(self.kind, self.tag, self.sequence, self.value, self.length)


def decode_head_untrusted(data: bytes | bytearray) -> Head:
    """Return the head in ``data``.

    Raises:
        RemoteProtocolError: it is none, or announces more than a piece.
    """
    try:
        kind, tag, sequence, value, length = _HEAD.unpack(data)
        head = Head(Kind(kind), tag, sequence, value, length)
    except (struct.error, ValueError) as exc:
        raise RemoteProtocolError(f"no head of a piece: {exc}") from exc
    if head.kind is Kind.FREE:
        raise RemoteProtocolError("a word of the way back came forward")
    if length > PIECE_BYTES:
        raise RemoteProtocolError(f"piece of {length} B > {PIECE_BYTES} B")
    if length and head.kind not in (Kind.PIECE, Kind.SLOT):
        raise RemoteProtocolError(f"{head.kind.name} with {length} B")
    return head


def encode_word(kind: Kind, value: int = 0) -> bytes:
    """Return a word for the way back."""
    return _WORD.pack(kind, value)


def decode_word_untrusted(data: bytes | bytearray) -> tuple[Kind, int]:
    """Return the word in ``data``.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        number, value = _WORD.unpack(data)
        kind = Kind(number)
    except (struct.error, ValueError) as exc:
        raise RemoteProtocolError(f"no word: {exc}") from exc
    if kind not in (Kind.BEAT, Kind.ABORT, Kind.FREE):
        raise RemoteProtocolError(f"{kind.name} on the way back")
    return kind, value
