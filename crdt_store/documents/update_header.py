"""The first lines of a pycrdt update: whose structs does it carry?

The library's own ``get_state`` cannot tell: it says nothing of updates that do not
start at clock 0, nor of those that only delete. Encoding version 1 (Yjs):

    number of clients, then for each: number of structs, client id, clock, structs...
    then the delete set
"""

from __future__ import annotations

from fabric.core.errors import RemoteProtocolError

_MAX_VARINT_BYTES = 10


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at
    raise RemoteProtocolError("update without a header")


def clients_of_untrusted(update: bytes) -> frozenset[int]:
    """Return the clients whose structs ``update`` carries: none, or one.

    Raises:
        RemoteProtocolError: truncated, or several clients: our authors write alone.
    """
    count, at = _varint(update, 0)
    if count == 0:
        return frozenset()
    if count > 1:
        raise RemoteProtocolError(f"an update of {count} clients")
    _, at = _varint(update, at)
    client, _ = _varint(update, at)
    return frozenset({client})
