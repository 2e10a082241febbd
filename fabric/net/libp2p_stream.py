"""A libp2p stream as a trio stream."""

from __future__ import annotations

from libp2p.abc import INetStream
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from trio import BrokenResourceError, BusyResourceError, ClosedResourceError
from trio.abc import HalfCloseableStream
from trio.lowlevel import checkpoint
from typing_extensions import override

from fabric.core.ids import PeerId
from fabric.net.libp2p_muxer import FabricStream


class Libp2pStream(HalfCloseableStream):
    """One stream of a connection; a reset is a :class:`trio.BrokenResourceError`.

    Reads and writes go straight to the muxed stream: py-libp2p's ``NetStream`` takes
    two locks around each, for states that the muxed stream keeps anyway.
    """

    def __init__(self, stream: INetStream) -> None:
        self._net = stream
        self._muxed: FabricStream = stream.muxed_stream
        self._closed = False
        self._sending = False

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return PeerId(str(self._muxed.muxed_conn.peer_id))

    @property
    def channel_binding(self) -> bytes:
        """What the ends of the connection under this stream, and no other, share."""
        return self._muxed.muxed_conn.channel_binding

    @override
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``; waits for as long as the peer is alive but slow."""
        if self._closed:
            raise ClosedResourceError("the stream is closed")
        if self._sending:
            raise BusyResourceError("another task is sending")
        self._sending = True
        try:
            await self._muxed.write(data)
        except MuxedStreamClosed as exc:
            raise ClosedResourceError(str(exc)) from exc
        except MuxedStreamReset as exc:
            raise self._broken(exc) from exc
        finally:
            self._sending = False

    @override
    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: the window is known only when there is something to send."""
        await checkpoint()

    @override
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has arrived, or b"" when the peer finished."""
        if self._closed:
            raise ClosedResourceError("the stream is closed")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        try:
            return await self._muxed.read(max_bytes)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamReset as exc:
            raise self._broken(exc) from exc

    def _broken(self, error: MuxedStreamReset) -> Exception:
        if self._closed:
            return ClosedResourceError("another task closed the stream")
        return BrokenResourceError(str(error))

    @override
    async def send_eof(self) -> None:
        """Finish our direction; the peer's goes on."""
        if self._closed:
            raise ClosedResourceError("the stream is closed")
        self._muxed.finish_now()
        await checkpoint()

    @override
    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives."""
        if not self._closed:
            self._closed = True
            self._muxed.discard_now()
            forget(self._net)
        await checkpoint()

    def abort(self) -> None:
        """Break both directions at once, without waiting."""
        self._closed = True
        reset(self._net)


def reset(stream: INetStream) -> None:
    """Reset ``stream`` without waiting, so that it works in a cancelled scope."""
    stream.muxed_stream.reset_now()
    forget(stream)


def forget(stream: INetStream) -> None:
    """Drop the connection's bookkeeping of ``stream``."""
    if stream.swarm_conn is not None:
        stream.swarm_conn.remove_stream(stream)
