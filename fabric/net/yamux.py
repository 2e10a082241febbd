"""Yamux, without I/O: many streams on one ordered byte stream.

Bytes from the peer go in through :meth:`YamuxSession.receive`; bytes for the peer come
out of :meth:`YamuxSession.output`. Streams are plain :class:`StreamState` records; the
caller learns which of them moved from :meth:`YamuxSession.take_changed`.

Rules, in short. A frame is a 12-byte header (version, type, flags, stream, length) and,
for DATA only, a body. Each side may send a stream as many bytes as the other granted:
256 KiB at first, then what WINDOW_UPDATE adds. A stream ends when both sides sent FIN,
or either sent RST. The side that opened the connection uses odd stream numbers.

Backpressure lives here: a writer gets no further than its credit and than
``MAX_OUTPUT_BYTES`` of unsent frames, so a session's memory is bounded by
``max_streams * window_bytes`` in and ``MAX_OUTPUT_BYTES`` plus control frames out.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct
from collections import deque

from fabric.core.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    ResourceExhausted,
)

_HEADER = struct.Struct("!BBHII")
HEADER_BYTES = _HEADER.size
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

INITIAL_WINDOW_BYTES = 256 * 1024
"""What each side may send before the first WINDOW_UPDATE (yamux spec)."""
MAX_FRAME_BYTES = 65519
"""Header and body of one DATA frame: exactly one Noise message of plaintext."""
MAX_OUTPUT_BYTES = 256 * 1024
"""Unsent bytes above which writers wait: four full frames keep a socket busy."""
MAX_CONTROL_BYTES = 256 * 1024
"""Unsent bytes beyond that: a peer that makes us answer but does not read is cut."""
MAX_CREDIT_BYTES = 1 << 32
"""Credit above this is an error of the peer; go-yamux never grants above 16 MiB."""
VIEW_BYTES = 16 * 1024
"""Received parts at least this long are kept without a copy."""
CLOSED_STREAM_SECONDS = 60.0
"""We sent FIN this long ago and the peer never did: the stream is reset."""


class StreamState:
    """One stream as the session sees it. Only the session changes it."""

    __slots__ = (
        "buffered",
        "chunks",
        "closed_at",
        "consumed",
        "discard",
        "local_closed",
        "receive_credit",
        "remote_closed",
        "reset",
        "send_credit",
        "stream_id",
        "window",
    )

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.chunks: deque[memoryview | bytearray] = deque()
        self.buffered = 0
        self.consumed = 0
        self.window = INITIAL_WINDOW_BYTES
        self.receive_credit = INITIAL_WINDOW_BYTES
        self.send_credit = INITIAL_WINDOW_BYTES
        self.local_closed = False
        self.remote_closed = False
        self.reset = False
        self.discard = False
        self.closed_at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether no frame of this stream can follow in either direction."""
        return self.reset or (self.local_closed and self.remote_closed)


def _store(stream: StreamState, part: memoryview) -> None:
    # A view keeps its whole message alive, so a peer could pin 64 KiB per byte sent:
    # only large parts stay views, small ones are gathered.
    if len(part) >= VIEW_BYTES:
        stream.chunks.append(part)
    elif stream.chunks and isinstance(last := stream.chunks[-1], bytearray):
        last += part
    else:
        stream.chunks.append(bytearray(part))
    stream.buffered += len(part)


class YamuxSession:
    """All streams of one connection.

    Args:
        initiator: Whether this side opened the connection.
        window_bytes: Largest receive window of a stream; it grows to this while the
            reader keeps up.
        max_streams: Live streams each direction; more inbound ones are reset.
    """

    def __init__(self, *, initiator: bool, window_bytes: int, max_streams: int) -> None:
        self._parity = 1 if initiator else 0
        self._next_id = 1 if initiator else 2
        self._window_bytes = max(window_bytes, INITIAL_WINDOW_BYTES)
        self._max_streams = max_streams
        self._streams: dict[int, StreamState] = {}
        self._opened: deque[StreamState] = deque()
        self._changed: set[StreamState] = set()
        self._output: deque[bytes] = deque()
        self._output_bytes = 0
        self._head = b""
        self._body_left = 0
        self._body_of: StreamState | None = None
        self._body_flags = 0
        self.frames_received = 0
        self.going_away = False

    # receiving

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer.

        Raises:
            RemoteProtocolError: the peer broke a rule; the connection is unusable.
        """
        view = memoryview(data)
        while view:
            if self._body_left:
                part = view[: self._body_left]
                view = view[len(part) :]
                self._take_body(part)
                continue
            need = HEADER_BYTES - len(self._head)
            self._head += bytes(view[:need])
            view = view[need:]
            if len(self._head) == HEADER_BYTES:
                header, self._head = self._head, b""
                self._take_header(header)

    def _take_header(self, header: bytes) -> None:
        version, kind, flags, stream_id, length = _HEADER.unpack(header)
        self.frames_received += 1
        if version != 0 or kind > GO_AWAY:
            raise RemoteProtocolError(f"yamux version {version}, type {kind}")
        if kind == PING:
            if flags & SYN:
                self._control(PING, ACK, 0, length)
        elif kind == GO_AWAY:
            self.going_away = True
        else:
            self._take_stream_frame(kind, flags, stream_id, length)

    def _take_stream_frame(
        self, kind: int, flags: int, stream_id: int, length: int
    ) -> None:
        stream = self._streams.get(stream_id)
        if flags & SYN:
            stream = self._accept(stream_id)
        if kind == DATA and length:
            self._start_body(stream, flags, stream_id, length)
            return
        if stream is None:
            return  # a late frame of a stream we already forgot
        if kind == WINDOW_UPDATE:
            stream.send_credit += length
            if stream.send_credit > MAX_CREDIT_BYTES:
                raise RemoteProtocolError(f"send credit of {stream.send_credit} B")
        self._apply_ending(stream, flags)
        self._changed.add(stream)

    def _accept(self, stream_id: int) -> StreamState | None:
        if stream_id == 0 or stream_id % 2 == self._parity:
            raise RemoteProtocolError(f"peer opened stream {stream_id}, not its own")
        if stream_id in self._streams:
            raise RemoteProtocolError(f"stream {stream_id} opened twice")
        inbound = sum(key % 2 != self._parity for key in self._streams)
        if inbound >= self._max_streams:
            self._control(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = StreamState(stream_id)
        self._streams[stream_id] = stream
        self._opened.append(stream)
        self._control(WINDOW_UPDATE, ACK, stream_id, 0)
        return stream

    def _start_body(
        self, stream: StreamState | None, flags: int, stream_id: int, length: int
    ) -> None:
        if stream is None or stream.discard:
            # nobody will read it: tell the writer, skip the bytes
            self._control(WINDOW_UPDATE, RST, stream_id, 0)
            if stream is not None:
                self._forget(stream)
            if length > self._window_bytes:
                raise RemoteProtocolError(f"frame of {length} B on a closed stream")
            self._body_of = None
        else:
            if length > stream.receive_credit:
                raise RemoteProtocolError(
                    f"frame of {length} B > window of {stream.receive_credit} B"
                )
            stream.receive_credit -= length
            self._body_of = stream
        self._body_left = length
        self._body_flags = flags

    def _take_body(self, part: memoryview) -> None:
        self._body_left -= len(part)
        stream = self._body_of
        if stream is None:
            return
        if not stream.reset and not stream.discard:
            _store(stream, part)
        self._changed.add(stream)
        if self._body_left == 0:
            self._apply_ending(stream, self._body_flags)

    def _apply_ending(self, stream: StreamState, flags: int) -> None:
        if flags & FIN:
            stream.remote_closed = True
        if flags & RST:
            stream.reset = True
        if stream.finished:
            self._forget(stream)

    # the caller's side of a stream

    def open(self) -> StreamState:
        """Open a stream; it can be written at once.

        Raises:
            ResourceExhausted: too many live streams of ours.
        """
        ours = sum(key % 2 == self._parity for key in self._streams)
        if ours >= self._max_streams:
            raise ResourceExhausted(f"{ours} streams on one connection")
        stream = StreamState(self._next_id)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self._control(WINDOW_UPDATE, SYN, stream.stream_id, 0)
        return stream

    def send(self, stream: StreamState, data: memoryview) -> int:
        """Queue as much of ``data`` as credit and room allow; return how much."""
        if stream.local_closed or stream.reset:
            raise LocalProtocolError(f"write on closed stream {stream.stream_id}")
        sent = 0
        while sent < len(data) and not self.output_full and stream.send_credit:
            size = min(
                len(data) - sent, stream.send_credit, MAX_FRAME_BYTES - HEADER_BYTES
            )
            header = _HEADER.pack(0, DATA, 0, stream.stream_id, size)
            self._queue(b"".join((header, data[sent : sent + size])))
            stream.send_credit -= size
            sent += size
        return sent

    def take(self, stream: StreamState, max_bytes: int) -> bytes:
        """Return up to ``max_bytes`` that arrived, and grant the peer as much again."""
        parts: list[memoryview | bytearray] = []
        left = max_bytes
        while left > 0 and stream.chunks:
            chunk = stream.chunks[0]
            if len(chunk) <= left:
                stream.chunks.popleft()
                parts.append(chunk)
            else:
                parts.append(chunk[:left])
                if isinstance(chunk, bytearray):
                    del chunk[:left]
                else:
                    stream.chunks[0] = chunk[left:]
            left -= len(parts[-1])
        taken = max_bytes - left
        stream.buffered -= taken
        stream.consumed += taken
        if not stream.remote_closed and not stream.reset:
            self._grant(stream)
        return b"".join(parts)

    def _grant(self, stream: StreamState) -> None:
        # half a window at a time: an update per read would double the packets
        if stream.consumed < stream.window // 2:
            return
        stream.consumed = 0
        stream.window = min(2 * stream.window, self._window_bytes)
        grant = stream.window - stream.receive_credit - stream.buffered
        if grant > 0:
            stream.receive_credit += grant
            self._control(WINDOW_UPDATE, 0, stream.stream_id, grant)

    def finish(self, stream: StreamState, now: float) -> None:
        """Send FIN: nothing more comes from us. Idempotent."""
        if stream.local_closed or stream.reset:
            return
        stream.local_closed = True
        stream.closed_at = now
        self._control(WINDOW_UPDATE, FIN, stream.stream_id, 0)
        if stream.finished:
            self._forget(stream)

    def discard(self, stream: StreamState, now: float) -> None:
        """Close both directions: FIN, and RST should the peer still send data."""
        stream.discard = True
        unread = stream.buffered > 0 and not stream.remote_closed
        stream.chunks.clear()
        stream.buffered = 0
        if unread:
            self.reset(stream)
        else:
            self.finish(stream, now)

    def reset(self, stream: StreamState) -> None:
        """Send RST: both directions end, unread data is lost. Idempotent."""
        if not stream.finished:
            self._control(WINDOW_UPDATE, RST, stream.stream_id, 0)
        stream.reset = True
        stream.chunks.clear()
        stream.buffered = 0
        self._forget(stream)

    # the connection

    @property
    def output_full(self) -> bool:
        """Whether writers must wait for :meth:`output` to be called."""
        return self._output_bytes >= MAX_OUTPUT_BYTES

    @property
    def has_output(self) -> bool:
        """Whether :meth:`output` would return something."""
        return bool(self._output)

    def output(self) -> bytes:
        """Return and forget all queued frames."""
        data = b"".join(self._output)
        self._output.clear()
        self._output_bytes = 0
        return data

    def take_opened(self) -> StreamState | None:
        """Return the next stream the peer opened, or None."""
        return self._opened.popleft() if self._opened else None

    def take_changed(self) -> set[StreamState]:
        """Return the streams with new data, credit or an ending since last asked."""
        changed, self._changed = self._changed, set()
        return changed

    def streams(self) -> tuple[StreamState, ...]:
        """Return the live streams."""
        return tuple(self._streams.values())

    def ping(self, nonce: int) -> None:
        """Ask for a sign of life."""
        self._control(PING, SYN, 0, nonce)

    def go_away(self) -> None:
        """Announce that we close the connection."""
        self._control(GO_AWAY, 0, 0, 0)

    def sweep(self, now: float) -> None:
        """Reset streams we closed long ago and the peer never did."""
        for stream in self.streams():
            since = stream.closed_at
            if since is not None and now - since > CLOSED_STREAM_SECONDS:
                self.reset(stream)
                self._changed.add(stream)

    def _forget(self, stream: StreamState) -> None:
        self._streams.pop(stream.stream_id, None)

    def _control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._queue(_HEADER.pack(0, kind, flags, stream_id, length))
        if self._output_bytes > MAX_OUTPUT_BYTES + MAX_FRAME_BYTES + MAX_CONTROL_BYTES:
            raise RemoteProtocolError("the peer does not read our answers")

    def _queue(self, frame: bytes) -> None:
        self._output.append(frame)
        self._output_bytes += len(frame)
