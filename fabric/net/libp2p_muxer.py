"""The trio shell around :mod:`fabric.net.yamux`, as py-libp2p wants a muxer.

Three tasks per connection: the reader feeds the session, the writer sends what the
session queued (many frames with one system call), the keepalive notices a dead peer.
No task waits for a slow *application*: a reader that computes for minutes holds up its
own stream only, for up to ``stall_seconds``, while a peer that is *gone* is noticed
within ``keepalive_seconds + dead_after_seconds`` and fails every stream at once.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import msgspec
import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from fabric.core.errors import RemoteProtocolError, ResourceExhausted
from fabric.net.libp2p_pulse import Pulse
from fabric.net.libp2p_session import FabricSession
from fabric.net.yamux import StreamState, YamuxSession

YAMUX_PROTOCOL = TProtocol("/yamux/1.0.0")
READ_ALL_BYTES = 64 * 1024
"""What a read without a size returns at most."""
FLUSH_SECONDS = 0.5
"""Grace for queued frames when a connection is closed in order."""


class MuxerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one connection; see :class:`fabric.net.config.HostConfig`."""

    window_bytes: int
    max_streams: int
    stall_seconds: float
    keepalive_seconds: float
    dead_after_seconds: float


class FabricStream(IMuxedStream):
    """One yamux stream."""

    def __init__(self, muxer: FabricMuxer, state: StreamState) -> None:
        self.muxed_conn = muxer
        self._muxer = muxer
        self._state = state
        self._moved = trio.lowlevel.ParkingLot()
        self._write_lock = trio.Lock()

    async def read(self, n: int | None = None) -> bytes:
        """Return what has arrived, at most ``n`` bytes; wait if there is nothing.

        Raises:
            MuxedStreamEOF: the peer finished.
            MuxedStreamReset: the stream or its connection broke.
        """
        limit = READ_ALL_BYTES if n is None or n < 0 else n
        await trio.lowlevel.checkpoint()
        state = self._state
        while True:
            if state.buffered:
                data = self._muxer.session.take(state, limit)
                self._muxer.kick()
                return data
            if state.reset or state.discard:
                raise MuxedStreamReset(self._muxer.why_reset)
            if state.remote_closed:
                raise MuxedStreamEOF("the peer finished the stream")
            await self._moved.park()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of ``data``; wait for the peer's window and the socket.

        After cancellation an unknown part was queued.

        Raises:
            MuxedStreamClosed: we finished the stream before.
            MuxedStreamReset: it broke, or its reader stalled for too long.
        """
        async with self._write_lock:
            view = memoryview(data)
            while True:
                self._check_writable()
                view = view[self._muxer.session.send(self._state, view) :]
                self._muxer.kick()
                if not view:
                    return
                if self._muxer.session.output_full:
                    await self._muxer.drained.park()
                else:
                    await self._wait_for_credit()

    def _check_writable(self) -> None:
        if self._state.reset:
            raise MuxedStreamReset(self._muxer.why_reset)
        if self._state.local_closed:
            raise MuxedStreamClosed("the stream is closed for writing")

    async def _wait_for_credit(self) -> None:
        limit = self._muxer.limits.stall_seconds
        with trio.move_on_after(limit) as scope:
            while not self._state.send_credit and not self._state.reset:
                await self._moved.park()
        if scope.cancelled_caught:
            self.reset_now()
            raise MuxedStreamReset(f"the peer read nothing for {limit:.0f} s")

    def wake(self) -> None:
        """Let waiting readers and writers look again."""
        self._moved.unpark_all()

    def reset_now(self) -> None:
        """Send RST and fail whoever waits, without waiting."""
        self._muxer.session.reset(self._state)
        self._muxer.forget(self._state)
        self._muxer.kick()
        self.wake()

    def finish_now(self) -> None:
        """Send FIN, without waiting; reading goes on."""
        self._muxer.session.finish(self._state, trio.current_time())
        self._muxer.kick()
        self.wake()

    def discard_now(self) -> None:
        """Close both directions, without waiting; what still arrives is refused."""
        self._muxer.session.discard(self._state, trio.current_time())
        self._muxer.forget(self._state)
        self._muxer.kick()
        self.wake()

    async def close(self) -> None:
        """Finish our direction (py-libp2p's meaning of close)."""
        self.finish_now()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Break both directions."""
        self.reset_now()
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        """Refuse: deadlines stand at the call site."""
        raise NotImplementedError("bound the call with trio.fail_after")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the peer's host and port."""
        return self._muxer.get_remote_address()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class FabricMuxer(IMuxedConn):
    """All streams of one authenticated connection."""

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        limits: MuxerLimits,
    ) -> None:
        assert isinstance(conn, FabricSession)
        self.peer_id = peer_id
        self.limits = limits
        self.session = YamuxSession(
            initiator=conn.is_initiator,
            window_bytes=limits.window_bytes,
            max_streams=limits.max_streams,
        )
        self.secured_conn = conn
        self.event_started = trio.Event()
        self.drained = trio.lowlevel.ParkingLot()
        self.why_reset = "the peer reset the stream"
        self._output_ready = trio.lowlevel.ParkingLot()
        self._streams: dict[StreamState, FabricStream] = {}
        # as many as may be live: the swarm takes them at once, so it never fills
        self._accept_send, self._accept_receive = trio.open_memory_channel[
            FabricStream
        ](limits.max_streams)
        self.pulse = Pulse(
            self.session,
            limits.keepalive_seconds,
            limits.dead_after_seconds,
            swept=self._dispatch,
            kick=self.kick,
        )
        self._scope = trio.CancelScope()
        self._closed = trio.Event()
        self._flushed = trio.Event()
        self.ended = trio.Event()  # nothing runs any more, the socket is closed

    @property
    def channel_binding(self) -> bytes:
        """32 bytes that both ends of this connection, and no other, share."""
        return self.secured_conn.channel_binding

    async def start(self) -> None:
        """Run until the connection ends. Never raises an error of the network."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_alive)
                    self.event_started.set()
        finally:
            self._end("the connection was closed")
            self.ended.set()
            with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_SECONDS):
                await self.secured_conn.close()

    async def _read(self) -> None:
        try:
            while not self.session.going_away:
                data = await self.secured_conn.read_message()
                if not data:
                    break
                self.session.receive(data)
                self.pulse.on_received()
                self._dispatch()
        except (BaseLibp2pError, RawConnError) as exc:
            self._end(f"the connection broke: {exc or type(exc).__name__}")
        except RemoteProtocolError as exc:
            self._end(f"the peer broke the protocol: {exc.reason}")
        else:
            self._end("the peer closed the connection")

    def _dispatch(self) -> None:
        if self._closed.is_set():
            return
        while (state := self.session.take_opened()) is not None:
            stream = FabricStream(self, state)
            self._streams[state] = stream
            try:
                self._accept_send.send_nowait(stream)
            except trio.WouldBlock:
                stream.reset_now()
        for state in self.session.take_changed():
            if (moved := self._streams.get(state)) is not None:
                moved.wake()
            if state.finished:
                self._streams.pop(state, None)
        self.kick()

    async def _write(self) -> None:
        try:
            while True:
                data = self.session.output()
                if not data:
                    if self._closed.is_set():
                        self._flushed.set()
                    await self._output_ready.park()
                    continue
                await self.secured_conn.write(data)
                self.drained.unpark_all()
        except (BaseLibp2pError, RawConnError) as exc:
            self._end(f"the connection broke: {exc or type(exc).__name__}")

    async def _keep_alive(self) -> None:
        self._end(await self.pulse.run())

    def kick(self) -> None:
        """Wake the writer if there is something to send."""
        if self.session.has_output:
            self._output_ready.unpark_all()

    def forget(self, state: StreamState) -> None:
        """Stop waking a stream that ended on our side."""
        self._streams.pop(state, None)

    def _end(self, why: str) -> None:
        """Fail every stream and stop the tasks. Idempotent."""
        if self._closed.is_set():
            self._scope.cancel()
            return
        self._closed.set()
        self.why_reset = why
        self._fail_streams()
        self._scope.cancel()

    def _fail_streams(self) -> None:
        for state, stream in tuple(self._streams.items()):
            state.reset = True
            stream.wake()
        self._streams.clear()
        self._accept_send.close()
        self.drained.unpark_all()

    async def open_stream(self) -> FabricStream:
        """Open a stream.

        Raises:
            MuxedStreamError: the connection ended, or has too many streams.
        """
        if self._closed.is_set():
            raise MuxedStreamError(self.why_reset)
        try:
            state = self.session.open()
        except ResourceExhausted as exc:
            raise MuxedStreamError(exc.reason) from exc
        stream = FabricStream(self, state)
        self._streams[state] = stream
        self.kick()
        await trio.lowlevel.checkpoint()
        return stream

    async def accept_stream(self) -> FabricStream:
        """Return the next stream the peer opened.

        Raises:
            MuxedConnUnavailable: the connection ended.
        """
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel as exc:
            raise MuxedConnUnavailable(self.why_reset) from exc

    async def close(self) -> None:
        """Send what is queued and GO_AWAY, for a moment, then close the socket."""
        if not self._closed.is_set():
            self._closed.set()
            self.why_reset = "we closed the connection"
            self.session.go_away()
            self.kick()
            self._fail_streams()
            with trio.CancelScope(shield=True), trio.move_on_after(FLUSH_SECONDS):
                if self.event_started.is_set():
                    await self._flushed.wait()
        self._scope.cancel()
        await self.secured_conn.close()

    @property
    def is_initiator(self) -> bool:
        """Whether we opened the connection."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self._closed.is_set()

    @property
    def is_closed(self) -> bool:
        """Whether the connection ended."""
        return self._closed.is_set()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return the peer's address."""
        remote = self.get_remote_address()
        if remote is None:
            return []
        family = "ip6" if ":" in remote[0] else "ip4"
        return [Multiaddr(f"/{family}/{remote[0]}/tcp/{remote[1]}")]

    def get_connection_type(self) -> ConnectionType:
        """Return that this is a direct connection."""
        return ConnectionType.DIRECT

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the peer's host and port."""
        return self.secured_conn.get_remote_address()
