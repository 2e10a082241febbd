"""The manifest: what a checkpoint holds and how each byte of it is checked.

docs/checkpoint-format.md is the specification. In short:

- ``tensors``: name -> element type, global shape, chunks. A chunk is a box stored
  row-major in one byte range of one file. The chunks tile the tensor; an empty tensor
  has none.
- ``files``: name -> size, BLAKE3, and the BLAKE3 of each 1 MiB block.
- ``aliases``: name -> name of the tensor it shares its elements with (tied weights).
- ``state``: everything that is not a tensor, as JSON. ``layout``: the parallel layout
  that wrote it, for people. ``parent``: root of the checkpoint before it, or empty.

The root of a checkpoint is the BLAKE3 of the manifest's bytes. The bytes are canonical:
one manifest has one encoding, so decoding and encoding again must give the same bytes,
which also excludes duplicate keys.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Final, Literal

import msgspec

from checkpoints.boxes import Box
from fabric.core.digest import hex_digest

MANIFEST_NAME = "manifest.json"
FORMAT_NAME: Final = "fabric-checkpoint"
FORMAT_VERSION: Final = 1

MAX_MANIFEST_BYTES = 64 << 20
"""Largest manifest read: about 800,000 chunks, or blocks of 900 GiB."""
MAX_BLOCKS = 100_000
"""Blocks of all files (DESIGN section 6): 97 GiB in one checkpoint."""
MAX_DIMS = 8
"""Dimensions of a tensor: the tiling check is linear in chunks times 2^ndim."""
MAX_STATE_DEPTH = 32
"""Nesting of ``state`` and ``layout``."""
MAX_NAME_CHARS = 512
"""Longest tensor name."""

Json = Any
"""A JSON value: None, bool, int of 64 bits, finite float, str, list, dict."""

Size = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Sizes = Annotated[tuple[Size, ...], msgspec.Meta(max_length=MAX_DIMS)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
FileName = Annotated[
    str,
    msgspec.Meta(
        max_length=200,
        extra_json_schema={"pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$"},
    ),
]
Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One box of a tensor, row-major at bytes ``begin <= at < end`` of ``file``."""

    offsets: Sizes
    sizes: Sizes
    file: FileName
    begin: Size
    end: Size

    @property
    def box(self) -> Box:
        """The chunk's place in the tensor."""
        return Box(self.offsets, self.sizes)


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor: element type (safetensors name), global shape, chunks that tile it."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Sizes
    chunks: tuple[Chunk, ...]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file: bytes, BLAKE3 of all of them, BLAKE3 of each 1 MiB block from byte 0."""

    size: Size
    blake3: Hash
    blocks: tuple[Hash, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole checkpoint; every field is always written."""

    format: Literal["fabric-checkpoint"]
    version: Literal[1]
    step: Size
    tensors: dict[Name, TensorEntry]
    files: dict[FileName, FileEntry]
    aliases: dict[Name, Name]
    state: dict[str, Json]
    layout: dict[str, Json]
    parent: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$", max_length=64)]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the canonical bytes of ``manifest``; their BLAKE3 is the root.

    Raises:
        ValueError: ``state`` or ``layout`` is not JSON (see :func:`check_json`).
    """
    check_json(manifest.state)
    check_json(manifest.layout)
    value = msgspec.to_builtins(manifest)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode()


def check_json(value: Json, depth: int = 0) -> None:
    """Pass if ``value`` has one JSON form.

    Raises:
        ValueError: not a JSON type, a float that is not finite, an integer above 64
            bits, or nested deeper than :data:`MAX_STATE_DEPTH`.
    """
    if depth > MAX_STATE_DEPTH:
        raise ValueError(f"nested deeper than {MAX_STATE_DEPTH}")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key that is not a string")
        for item in value.values():
            check_json(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_json(item, depth + 1)
    else:
        _check_json_leaf(value)


def _check_json_leaf(value: Json) -> None:
    if not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"{type(value).__name__} is not a JSON type")
    if isinstance(value, str):
        value.encode()  # a lone surrogate has no UTF-8 form: UnicodeError, a ValueError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"float {value} has no JSON form")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"integer of {value.bit_length()} bits")


def root_of(data: bytes) -> str:
    """Return the root id of a manifest's bytes: 64 hex characters."""
    return hex_digest(data)
