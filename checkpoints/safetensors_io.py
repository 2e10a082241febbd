"""Read and write the safetensors container: a JSON header, then raw tensor bytes.

    8 bytes little-endian N | N bytes JSON | data

The JSON is ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, and under
``__metadata__`` a map of strings; offsets count from the start of the data, without
holes. The header we write is padded with spaces so that data starts at a multiple of 64
bytes, and tensors whose size is a multiple of 64 come first, so that they stay aligned.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, BinaryIO

import msgspec

from checkpoints.dtypes import item_bytes, tensor_bytes
from fabric.core.errors import IntegrityError

ALIGN_BYTES = 64
"""A cache line, and what torch's allocator gives."""
MAX_HEADER_BYTES = 32 << 20
"""Bound of what is parsed, about 300,000 tensors; the safetensors library's: 100 MB."""
METADATA_KEY = "__metadata__"

_LENGTH = struct.Struct("<Q")
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class HeaderEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a file; ``data_offsets`` count from the start of the data."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[Size, Size]


class Header(msgspec.Struct, frozen=True):
    """What a file holds.

    Attributes:
        tensors: By name.
        metadata: The free text map, often ``{"format": "pt"}``.
        data_begin: File offset of the data, in bytes.
    """

    tensors: dict[str, HeaderEntry]
    metadata: dict[str, str]
    data_begin: int


class NewTensor(msgspec.Struct, frozen=True):
    """A tensor to be laid out in a new file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def layout(
    tensors: Sequence[NewTensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[NewTensor], Header]:
    """Return a new file's header bytes, the order of its tensors, and their places.

    Raises:
        ValueError: two tensors of one name, or the reserved name.
    """
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors) or METADATA_KEY in names:
        raise ValueError("two tensors of one name in a file, or __metadata__")
    order = sorted(tensors, key=_alignment)
    entries: dict[str, HeaderEntry] = {}
    at = 0
    for tensor in order:
        end = at + tensor_bytes(tensor.dtype, tensor.shape)
        entries[tensor.name] = HeaderEntry(tensor.dtype, tensor.shape, (at, end))
        at = end
    body: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    body.update(msgspec.to_builtins(entries))
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % ALIGN_BYTES)
    header = Header(entries, dict(metadata), _LENGTH.size + len(text))
    return _LENGTH.pack(len(text)) + text, order, header


def _alignment(tensor: NewTensor) -> tuple[int, int, str]:
    """Sort key: multiples of 64 B first, then wide elements, then by name."""
    odd = tensor_bytes(tensor.dtype, tensor.shape) % ALIGN_BYTES != 0
    return (odd, -item_bytes(tensor.dtype) if odd else 0, tensor.name)


def read_header_untrusted(file: BinaryIO) -> Header:
    """Return the checked header of an open file.

    Raises:
        IntegrityError: not safetensors, lying sizes, duplicate names, holes, overlaps,
            or a header above :data:`MAX_HEADER_BYTES`; nothing else.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise _bad(f"file of {size} B has no header")
    (length,) = _LENGTH.unpack(prefix)
    if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
        raise _bad(f"header of {length} B in a file of {size} B")
    return parse_header_untrusted(file.read(length), size - _LENGTH.size - length)


def parse_header_untrusted(text: bytes, data_bytes: int) -> Header:
    """Return the checked header from its JSON ``text``.

    Args:
        text: The JSON, without the length in front.
        data_bytes: Bytes of the file after the header.

    Raises:
        IntegrityError: as :func:`read_header_untrusted`.
    """
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
        if not isinstance(raw, dict):
            raise ValueError("not an object")  # noqa: TRY004  (bytes, not our type)
        metadata = msgspec.convert(raw.pop(METADATA_KEY, {}), dict[str, str])
        tensors = msgspec.convert(raw, dict[str, HeaderEntry])
    except (ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise _bad(f"header: {str(exc)[:200]}") from exc
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != at or end - begin != tensor_bytes(entry.dtype, entry.shape):
            raise _bad(f"{name[:80]!r}: bytes {begin}..{end} do not follow {at}")
        at = end
    if at != data_bytes:
        raise _bad(f"{data_bytes} B of data, {at} B described")
    return Header(tensors, metadata, _LENGTH.size + len(text))


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("duplicate keys")
    return result


def _bad(reason: str) -> IntegrityError:
    return IntegrityError(
        f"safetensors: {reason}",
        code="E_SAFETENSORS",
        next_step="the file is damaged or not safetensors: use another copy",
    )
