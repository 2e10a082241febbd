"""BLAKE3, the one hash of the project."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

BLOCK_BYTES = 1 << 20
"""1 MiB: the one unit of hashing and transfer (DESIGN section 6)."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32-byte BLAKE3 of ``data``."""
    return blake3(data).digest()


def long_digest(data: bytes | bytearray | memoryview, num_bytes: int) -> bytes:
    """Return the first ``num_bytes`` of the BLAKE3 output stream of ``data``."""
    return blake3(data).digest(length=num_bytes)


def hex_digest(data: bytes | bytearray | memoryview) -> str:
    """Return the BLAKE3 of ``data`` as 64 hex characters."""
    return blake3(data).hexdigest()


def block_digests(data: bytes | memoryview) -> list[bytes]:
    """Return the BLAKE3 of each 1 MiB block of ``data``, the last one shorter."""
    view = memoryview(data)
    return [
        digest(view[at : at + BLOCK_BYTES]) for at in range(0, len(view), BLOCK_BYTES)
    ]


def rendezvous_order(key: bytes, names: Iterable[str]) -> list[str]:
    """Return ``names`` by descending hash with ``key``: the same order on every peer.

    Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates"
    (1998): highest random weight.
    """
    return sorted(names, key=lambda n: (digest(key + n.encode()), n), reverse=True)
