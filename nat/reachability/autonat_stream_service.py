"""Messages on an AutoNAT stream, each after its length as a varint."""

from __future__ import annotations

import trio

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.protobuf import decode_varint_untrusted, encode_varint
from nat.reachability.autonat_messages import MAX_MESSAGE_BYTES

_MAX_LENGTH_BYTES = 10


class MessageStream:
    """Sends and receives messages of at most MAX_MESSAGE_BYTES."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, message: bytes) -> None:
        """Send one message.

        Raises:
            Unavailable: the stream broke.
        """
        try:
            await self._stream.send_all(encode_varint(len(message)) + message)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise Unavailable(f"AutoNAT stream broke: {exc}") from exc

    async def receive_untrusted(self) -> bytes:
        """Return the next message.

        Raises:
            RemoteProtocolError: it is too long.
            Unavailable: the stream ended or broke before.
        """
        while (message := self._take_untrusted()) is None:
            try:
                data = await self._stream.receive_some(MAX_MESSAGE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise Unavailable(f"AutoNAT stream broke: {exc}") from exc
            if not data:
                raise Unavailable("AutoNAT stream ended without a message")
            self._buffer += data
        return message

    def _take_untrusted(self) -> bytes | None:
        head = bytes(self._buffer[:_MAX_LENGTH_BYTES])
        if all(byte & 0x80 for byte in head) and len(head) < _MAX_LENGTH_BYTES:
            return None  # inside the length
        size, start = decode_varint_untrusted(head)
        if size > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(f"AutoNAT message of {size} B")
        if len(self._buffer) < start + size:
            return None
        message = bytes(self._buffer[start : start + size])
        del self._buffer[: start + size]
        return message
