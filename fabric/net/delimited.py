"""Protobuf messages on a stream, each behind its length as a varint.

All of libp2p's small protocols frame so: relay, DCUtR, AutoNAT, rendezvous, identify. A
relay's stream *is* the circuit after its first message, so a message is taken from a
stream and not a byte more.
"""

from __future__ import annotations

import trio

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.protobuf import decode_varint_untrusted, delimited

MAX_LENGTH_BYTES = 3
"""A length below 2**21; no message of ours may have more."""


class MessageStream:
    """Messages in both directions of one stream.

    Args:
        stream: The caller's, who closes it.
        max_bytes: Largest message received.
    """

    def __init__(self, stream: trio.abc.Stream, max_bytes: int) -> None:
        self._stream = stream
        self._max = max_bytes

    async def send(self, message: bytes) -> None:
        """Send one message.

        Raises:
            Unavailable: the stream broke.
        """
        await send_bytes(self._stream, delimited(message))

    async def receive_untrusted(self) -> bytes:
        """Return the next message; see :func:`receive_message_untrusted`."""
        return await receive_message_untrusted(self._stream, self._max)


async def send_bytes(stream: trio.abc.Stream, data: bytes) -> None:
    """Send ``data``, which has its length in front.

    Raises:
        Unavailable: the stream broke.
    """
    try:
        await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise Unavailable(f"the stream broke: {exc}") from exc


async def receive_message_untrusted(stream: trio.abc.Stream, max_bytes: int) -> bytes:
    """Return the next message without its length; bound it at the call site.

    What a length claims is not kept room for before it has come.

    Raises:
        RemoteProtocolError: its length is malformed or above ``max_bytes``, or the
            stream ended inside it.
        Unavailable: the stream ended before it, or broke.
    """
    try:
        head = await _some(stream, 1)
        if not head:
            raise Unavailable("the stream ended before its message")
        while head[-1] & 0x80:
            if len(head) == MAX_LENGTH_BYTES:
                raise RemoteProtocolError("a message of endless length")
            head += await _more(stream, 1)
        size, _ = decode_varint_untrusted(head)
        if size > max_bytes:
            raise RemoteProtocolError(f"a message of {size} B > {max_bytes} B")
        body = bytearray()
        while len(body) < size:
            body += await _more(stream, size - len(body))
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise Unavailable(f"the stream broke: {exc}") from exc
    return bytes(body)


async def _some(stream: trio.abc.Stream, max_bytes: int) -> bytes:
    return bytes(await stream.receive_some(max_bytes))


async def _more(stream: trio.abc.Stream, max_bytes: int) -> bytes:
    data = await _some(stream, max_bytes)
    if not data:
        raise RemoteProtocolError("the stream ended inside a message")
    return data
