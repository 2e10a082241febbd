"""Messages of the content service.

RPC: ``content.manifest`` and ``content.have`` take an :class:`Ask` and answer with
:class:`Manifest`, :class:`Have` or :class:`NotHere`.

Bulk service ``content``: the client sends fixed 36-byte requests (root, block number,
big-endian), several ahead; the server answers each in order with a 4-byte big-endian
length and that many bytes, 0 meaning that it does not hold the block.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from dht.manifest import MAX_BLOCKS, MAX_MANIFEST_BYTES
from fabric.core.codec import Codec

METHOD_MANIFEST = "content.manifest"
METHOD_HAVE = "content.have"
BULK_SERVICE = "content"

REQUEST = struct.Struct(">32sI")
LENGTH = struct.Struct(">I")

Root = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Ask about the content ``root``."""

    root: Root


class Manifest(msgspec.Struct, frozen=True, tag="manifest"):
    """The encoded manifest, to be checked against the root."""

    raw: Annotated[bytes, msgspec.Meta(max_length=MAX_MANIFEST_BYTES)]


class Have(msgspec.Struct, frozen=True, tag="have"):
    """Which blocks the answering peer holds, one bit each (``bitmap.py``)."""

    bits: Annotated[bytes, msgspec.Meta(max_length=(MAX_BLOCKS + 7) // 8)]


class NotHere(msgspec.Struct, frozen=True, tag="not_here"):
    """The answering peer holds nothing of it."""


Message = Ask | Manifest | Have | NotHere

CODEC: Codec[Message] = Codec(Message, max_bytes=MAX_MANIFEST_BYTES + 64)
