"""One RPC connection without I/O: frames, request ids, deadlines, keepalive.

    4 B length of the rest | 1 B kind | 4 B id | body            (big-endian)

    REQUEST   body = 4 B milliseconds left | 1 B method length | method | payload
    RESPONSE  body = payload
    REFUSAL   body = msgpack of Refusal
    CANCEL    the caller no longer wants the answer
    PING      answered by PONG with the same id

Either side calls. Ids are chosen by the caller and name a call until it is answered,
cancelled or expired; an answer to an id that is not open is late and ignored. Time is
an argument; the shell (``rpc_connection.py``) sends what :meth:`RpcCore.take_output`
returns and calls :meth:`RpcCore.on_timeout` at :meth:`RpcCore.next_timeout`.
"""

from __future__ import annotations

import enum
import heapq
import struct
from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.errors import (
    FabricError,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
)
from fabric.net.data_config import RpcConfig
from fabric.net.rpc_api import MAX_RPC_BYTES
from fabric.net.rpc_liveness import Liveness

MAX_METHOD_BYTES = 64
"""Longest method name."""
_HEADER = struct.Struct(">IBI")
_AFTER_LENGTH = _HEADER.size - 4
_REQUEST = struct.Struct(">IB")
_MAX_LENGTH = _AFTER_LENGTH + _REQUEST.size + MAX_METHOD_BYTES + MAX_RPC_BYTES
_MAX_ID = 2**32 - 1
_MAX_TIMEOUT_MS = 2**32 - 1


class Kind(enum.IntEnum):
    """Frame kinds."""

    REQUEST = 1
    RESPONSE = 2
    REFUSAL = 3
    CANCEL = 4
    PING = 5
    PONG = 6


class Refusal(msgspec.Struct, frozen=True):
    """A FabricError on the wire."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""
    next_step: Annotated[str, msgspec.Meta(max_length=500)] = ""
    retry_after_seconds: float = 0.0


class RequestReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer calls ``method``; answer with ``respond`` or ``refuse``."""

    id: int
    method: str
    payload: bytes
    seconds_left: float


class ResponseReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer answered our call ``id``."""

    id: int
    payload: bytes


class RefusalReceived(msgspec.Struct, frozen=True):
    """The peer declined our call ``id``."""

    id: int
    error: RemoteRefused


class CancelReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer no longer wants the answer to its call ``id``."""

    id: int


Event = RequestReceived | ResponseReceived | RefusalReceived | CancelReceived

_REFUSAL: Codec[Refusal] = Codec(Refusal, max_bytes=8192)


def encode_refusal(error: FabricError) -> bytes:
    """Return ``error`` as the body of a refusal, its texts cut to their bounds."""
    retry = error.retry_after_seconds if isinstance(error, RemoteRefused) else 0.0
    return _REFUSAL.encode(
        Refusal(error.code[:64], error.reason[:500], error.next_step[:500], retry)
    )


class RpcCore:
    """The state of one connection. Touched by one shell, from one thread.

    Args:
        config: Limits and times.
        now: Seconds, monotonic; the same clock as every later ``now``.
    """

    def __init__(self, config: RpcConfig, now: float) -> None:
        self._config = config
        self._buffer = bytearray()
        self._output: list[bytes] = []
        self._queued_bytes = 0
        self._next_id = 0
        self._open: set[int] = set()  # our calls without an answer
        self._serving: set[int] = set()  # the peer's calls without an answer
        self._deadlines: list[tuple[float, int]] = []
        self._last_call = now
        self._liveness = Liveness(config, now)
        self._draining = False

    @property
    def has_output(self) -> bool:
        """Whether :meth:`take_output` would return bytes."""
        return bool(self._output)

    @property
    def rtt_seconds(self) -> float | None:
        """Smoothed round-trip time, or None before the first answer to a ping."""
        return self._liveness.rtt_seconds

    @property
    def in_doubt(self) -> bool:
        """Whether the peer was asked if it is there and has not answered yet."""
        return self._liveness.in_doubt

    @property
    def is_draining(self) -> bool:
        """Whether another connection replaces this one."""
        return self._draining

    def silent_seconds(self, now: float) -> float:
        """Return how long nothing has arrived."""
        return self._liveness.silent_seconds(now)

    def doubt(self, now: float) -> None:
        """Ask the peer whether it is there; it must answer soon."""
        self._liveness.doubt(now)

    def request(self, method: str, payload: bytes, deadline: float, now: float) -> int:
        """Queue a call and return its id, which is open until ``deadline``.

        Raises:
            ResourceExhausted: too many calls or too many bytes wait.
            ValueError: the method or the payload is too long.
        """
        name = method.encode()
        if len(name) > MAX_METHOD_BYTES or len(payload) > MAX_RPC_BYTES:
            raise ValueError(
                f"call of {len(payload)} B to {method!r}: at most {MAX_RPC_BYTES} B to "
                f"a name of {MAX_METHOD_BYTES} B"
            )
        if len(self._open) >= self._config.max_in_flight:
            raise ResourceExhausted(f"{len(self._open)} calls wait for this peer")
        self._check_room(len(payload))
        call = self._new_id()
        left = int(min(max((deadline - now) * 1000, 0), _MAX_TIMEOUT_MS))
        head = _REQUEST.pack(left, len(name)) + name
        self._queue(Kind.REQUEST, call, head, payload)
        self._open.add(call)
        self._last_call = now
        self._add_deadline(deadline, call)
        return call

    def cancel(self, call: int) -> None:
        """Give up on our call ``call``: its late answer is ignored."""
        if call in self._open:
            self._open.discard(call)
            self._queue(Kind.CANCEL, call)

    def respond(self, call: int, payload: bytes) -> None:
        """Queue the answer to the peer's call, unless the peer cancelled it.

        Raises:
            ResourceExhausted: the peer does not take its answers; disconnect it.
        """
        if len(payload) > MAX_RPC_BYTES:
            raise ValueError(f"response of {len(payload)} B > {MAX_RPC_BYTES} B")
        if call in self._serving:
            self._check_room(len(payload))
            self._serving.discard(call)
            self._queue(Kind.RESPONSE, call, b"", payload)

    def refuse(self, call: int, error: FabricError) -> None:
        """Queue a refusal of the peer's call, unless the peer cancelled it.

        Raises:
            ResourceExhausted: the peer does not take its answers; disconnect it.
        """
        if call in self._serving:
            self._check_room(0)
            self._serving.discard(call)
            self._queue(Kind.REFUSAL, call, encode_refusal(error))

    def take_output(self) -> bytes:
        """Return all queued frames as one string; report it with :meth:`on_sent`."""
        output = self._output
        self._output = []
        return b"".join(output)

    def on_sent(self, count: int) -> None:
        """Note that ``count`` bytes left."""
        self._queued_bytes -= count
        self._liveness.on_sent()

    def receive(self, data: bytes | bytearray, now: float) -> list[Event]:
        """Return what the peer's ``data`` completes; pings are answered here.

        Raises:
            RemoteProtocolError: a frame is oversized or malformed; close.
        """
        self._liveness.on_received(now)
        self._buffer += data
        events: list[Event] = []
        at = 0
        size = len(self._buffer)
        with memoryview(self._buffer) as view:
            while size - at >= _HEADER.size:
                length, kind, call = _HEADER.unpack_from(view, at)
                if not _AFTER_LENGTH <= length <= _MAX_LENGTH:
                    raise RemoteProtocolError(f"frame of {length} B > {_MAX_LENGTH} B")
                end = at + 4 + length
                if end > size:
                    break
                with view[at + _HEADER.size : end] as body:
                    event = self._on_frame_untrusted(kind, call, body, now)
                if event is not None:
                    events.append(event)
                at = end
        if at:
            del self._buffer[:at]
        return events

    def drain(self) -> None:
        """Accept that another connection replaces this one: finish, then close."""
        self._draining = True

    def is_drained(self, now: float) -> bool:
        """Whether a superseded connection has nothing left to do."""
        quiet = now - self._last_call >= self._config.drain_seconds
        return self._draining and quiet and not self._open and not self._serving

    def next_timeout(self) -> float:
        """Return when :meth:`on_timeout` has something to do."""
        while self._deadlines and self._deadlines[0][1] not in self._open:
            heapq.heappop(self._deadlines)  # answered in time
        due = self._liveness.next_timeout()
        return min(due, self._deadlines[0][0]) if self._deadlines else due

    def on_timeout(self, now: float) -> list[int]:
        """Return our calls that expired; queue a ping when it is time for one.

        Raises:
            PeerTimeout: the peer sent nothing, or took nothing, for too long; close.
        """
        if now - self.next_timeout() > self._config.ping_interval_seconds:
            self._liveness.on_late(now)
        ping = self._liveness.on_timeout(now, self._queued_bytes)
        if ping is not None:
            self._queue(Kind.PING, ping)
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            call = heapq.heappop(self._deadlines)[1]
            if call in self._open:
                self.cancel(call)
                expired.append(call)
        return expired

    def _on_frame_untrusted(
        self, kind: int, call: int, body: memoryview, now: float
    ) -> Event | None:
        match kind:
            case Kind.REQUEST:
                return self._on_request_untrusted(call, body, now)
            case Kind.RESPONSE:
                if call in self._open:
                    self._open.discard(call)
                    return ResponseReceived(call, bytes(body))
            case Kind.REFUSAL:
                refusal = _REFUSAL.decode_untrusted(bytes(body))
                if call in self._open:
                    self._open.discard(call)
                    return RefusalReceived(call, _as_error(refusal))
            case Kind.CANCEL:
                if call in self._serving:
                    self._serving.discard(call)
                    return CancelReceived(call)
            case Kind.PING:
                self._check_room(0)
                self._queue(Kind.PONG, call)
            case Kind.PONG:
                self._liveness.on_pong(call, now)
            case _:
                raise RemoteProtocolError(f"frame of unknown kind {kind}")
        return None

    def _on_request_untrusted(
        self, call: int, body: memoryview, now: float
    ) -> RequestReceived:
        if len(body) < _REQUEST.size:
            raise RemoteProtocolError(f"request of {len(body)} B")
        left_ms, name_bytes = _REQUEST.unpack_from(body)
        start = _REQUEST.size + name_bytes
        if name_bytes > MAX_METHOD_BYTES or start > len(body):
            raise RemoteProtocolError(f"method name of {name_bytes} B")
        if len(body) - start > MAX_RPC_BYTES:
            raise RemoteProtocolError(f"request of {len(body) - start} B")
        if call in self._serving:
            raise RemoteProtocolError(f"request id {call} is already in use")
        try:
            method = str(body[_REQUEST.size : start], "ascii")
        except UnicodeDecodeError as exc:
            raise RemoteProtocolError("method name is not ASCII") from exc
        self._serving.add(call)
        self._last_call = now
        return RequestReceived(call, method, bytes(body[start:]), left_ms / 1000)

    def _queue(
        self, kind: int, call: int, head: bytes = b"", body: bytes = b""
    ) -> None:
        size = _AFTER_LENGTH + len(head) + len(body)
        self._output.append(_HEADER.pack(size, kind, call) + head)
        if body:
            self._output.append(body)  # not copied until all is joined
        self._queued_bytes += size + 4

    def _check_room(self, size: int) -> None:
        if self._queued_bytes + size > self._config.max_queued_bytes:
            raise ResourceExhausted(
                f"{self._queued_bytes} B wait for this peer, at most "
                f"{self._config.max_queued_bytes} B may"
            )

    def _new_id(self) -> int:
        while True:
            self._next_id = self._next_id % _MAX_ID + 1
            if self._next_id not in self._open:
                return self._next_id

    def _add_deadline(self, deadline: float, call: int) -> None:
        heapq.heappush(self._deadlines, (deadline, call))
        if len(self._deadlines) > 2 * len(self._open) + 1024:  # mostly answered calls
            self._deadlines = [d for d in self._deadlines if d[1] in self._open]
            heapq.heapify(self._deadlines)


def _as_error(refusal: Refusal) -> RemoteRefused:
    return RemoteRefused(
        refusal.reason,
        code=refusal.code,
        next_step=refusal.next_step,
        retry_after_seconds=refusal.retry_after_seconds,
    )
