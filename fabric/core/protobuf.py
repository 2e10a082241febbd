"""Protocol Buffers' wire format, as far as libp2p's small messages need it.

A message is a list of fields in wire order: varints, fixed 64-bit integers and byte
strings. What a field number means is known by the message that reads it, so a reader
states its fields instead of generating code. Source: the encoding reference of Protocol
Buffers, sections "Message Structure" and "Base 128 Varints".
"""

from __future__ import annotations

from collections.abc import Iterable

from fabric.core.errors import RemoteProtocolError

VARINT = 0
FIXED64 = 1
LENGTH = 2
FIXED32 = 5

MAX_FIELDS = 256
"""Fields of one message; libp2p's largest have a few lists of addresses."""
_MAX_VARINT_BYTES = 10

Value = int | bytes
Fields = dict[int, list[Value]]
"""Values by field number, in the order in which they came."""


def encode_varint(value: int) -> bytes:
    """Return ``value`` (0 to 2**64 - 1) in base 128, least significant group first."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} is not an unsigned 64-bit integer")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def delimited(message: bytes) -> bytes:
    """Return ``message`` behind its length as a varint."""
    return encode_varint(len(message)) + message


def encode_message(fields: Iterable[tuple[int, Value | None]]) -> bytes:
    """Return the message of ``fields``: (number, value); None leaves a field out.

    Integers become varints, bytes length-delimited fields.
    """
    out = bytearray()
    for number, value in fields:
        if value is None:
            continue
        if isinstance(value, int):
            out += encode_varint(number << 3 | VARINT) + encode_varint(value)
        else:
            out += encode_varint(number << 3 | LENGTH)
            out += encode_varint(len(value)) + value
    return bytes(out)


def encode_fixed64(number: int, value: int) -> bytes:
    """Return one field of type ``fixed64``."""
    return encode_varint(number << 3 | FIXED64) + value.to_bytes(8, "little")


def decode_message_untrusted(data: bytes) -> Fields:
    """Return the fields of ``data``; unknown ones are the caller's to ignore.

    Raises:
        RemoteProtocolError: truncated, a group, or more than MAX_FIELDS fields.
    """
    fields: Fields = {}
    at = count = 0
    while at < len(data):
        count += 1
        if count > MAX_FIELDS:
            raise RemoteProtocolError(f"more than {MAX_FIELDS} protobuf fields")
        key, at = decode_varint_untrusted(data, at)
        number, kind = key >> 3, key & 7
        value: Value
        if kind == VARINT:
            value, at = decode_varint_untrusted(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
            value = int.from_bytes(_take(data, at, size), "little")
            at += size
        elif kind == LENGTH:
            size, at = decode_varint_untrusted(data, at)
            value = _take(data, at, size)
            at += size
        else:
            raise RemoteProtocolError(f"protobuf wire type {kind}")
        fields.setdefault(number, []).append(value)
    return fields


def decode_varint_untrusted(data: bytes, at: int = 0) -> tuple[int, int]:
    """Return the varint at ``at`` and the position after it.

    Raises:
        RemoteProtocolError: truncated, or above 64 bits.
    """
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if at + index >= len(data):
            raise RemoteProtocolError("protobuf varint is truncated")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            if value >= 1 << 64:
                break
            return value, at + index + 1
    raise RemoteProtocolError("protobuf varint above 64 bits")


def last_int(fields: Fields, number: int, default: int = 0) -> int:
    """Return the last integer of field ``number``, or ``default`` (proto3: last wins).

    Raises:
        RemoteProtocolError: the field is a byte string.
    """
    value = fields.get(number, [default])[-1]
    if not isinstance(value, int):
        raise RemoteProtocolError(f"protobuf field {number} is not an integer")
    return value


def last_bytes(fields: Fields, number: int) -> bytes:
    """Return the last byte string of field ``number``, or none: ``b""``.

    Raises:
        RemoteProtocolError: the field is an integer.
    """
    found = all_bytes(fields, number)
    return found[-1] if found else b""


def all_bytes(fields: Fields, number: int) -> list[bytes]:
    """Return every byte string of field ``number``.

    Raises:
        RemoteProtocolError: one is an integer.
    """
    found = []
    for value in fields.get(number, []):
        if not isinstance(value, bytes):
            raise RemoteProtocolError(f"protobuf field {number} is not bytes")
        found.append(value)
    return found


def _take(data: bytes, at: int, size: int) -> bytes:
    if size > len(data) - at:
        raise RemoteProtocolError("protobuf field is truncated")
    return data[at : at + size]
