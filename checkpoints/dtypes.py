"""Element types, by the names of the safetensors format."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fabric.core.errors import IntegrityError

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element, little-endian. Sub-byte types are not in version 1."""


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of ``dtype``.

    Raises:
        IntegrityError: the name is not in :data:`DTYPE_BYTES`.
    """
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise IntegrityError(
            f"unknown element type {dtype[:40]!r}", code="E_DTYPE"
        ) from None


def tensor_bytes(dtype: str, sizes: Sequence[int]) -> int:
    """Return the bytes of a dense box of ``sizes``."""
    return item_bytes(dtype) * prod(sizes)
