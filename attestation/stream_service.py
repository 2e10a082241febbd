"""Whole messages over a trio stream, for the admission exchange."""

from __future__ import annotations

import trio

from attestation.messages import CODEC, Message
from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.framing import FrameReader, encode_frame

_CHUNK_BYTES = 65536


class MessageStream:
    """Frames of one exchange.

    Args:
        stream: Owned by the caller, who closes it.
        max_bytes: Largest message accepted from the other end.
    """

    def __init__(self, stream: trio.abc.Stream, *, max_bytes: int) -> None:
        self._stream = stream
        self._reader = FrameReader(max_bytes=max_bytes)

    async def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            Unavailable: the other end is gone.
        """
        try:
            await self._stream.send_all(encode_frame(CODEC.encode(message)))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise Unavailable("the connection broke during admission") from exc

    async def receive(self) -> bytes:
        """Return the next message's bytes, not yet decoded.

        Raises:
            Unavailable: the other end closed or is gone.
            RemoteProtocolError: oversized, or sent before its turn.
        """
        while True:
            try:
                data = await self._stream.receive_some(_CHUNK_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise Unavailable("the connection broke during admission") from exc
            if not data:
                raise Unavailable("the other end closed the admission stream")
            frames = list(self._reader.feed(data))
            if len(frames) > 1:
                raise RemoteProtocolError("a second message before our answer")
            if frames:
                return frames[0]
