"""The exchange of a probe on a blocking socket: bounded bytes each way, then two rates.

    asks:    "FPB1" | bytes it will send | bytes it wants        (12 B)
    answers: status | seconds to wait                             (5 B; 0 = go)
    asks:    burst                     answers: rate of that burst (8 B)
    answers: burst                     asks:    rate of that burst (8 B)

A burst is chunks of a 4-byte length and that many bytes; length 0 ends it. Each
direction is measured where it arrives. Who receives may say "enough" before its rate:
then the sender stops. Neither side sends more than its own bound, whatever the other
asks for.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from fabric.bulk.channel import CHUNK_BYTES
from fabric.core.errors import PeerTimeout, RemoteProtocolError, Unavailable
from nat.probe.config import ProbeConfig
from nat.probe.estimate import Arrival, estimate, is_stable

_MAGIC = b"FPB1"
_REQUEST = struct.Struct(">4sII")
_ANSWER = struct.Struct(">BI")
_LENGTH = struct.Struct(">I")
_RATE = struct.Struct(">Q")
_PIECE_BYTES = 16_380
"""With its length one TLS record (RFC 8446, section 5.1): small, so that a sender
learns of its time limit soon."""
_MAX_RATE = 1e12
"""What a peer may claim, bytes per second."""
_ENOUGH = 2**64 - 1
"""In the place of a rate: the rate is known, send no more; then follows the rate."""
_TCP_NOTSENT_LOWAT = 25
_NOTSENT_BYTES = 131_072
"""Waiting in our kernel: more would leave after the time limit."""
_STABLE_EVERY = 16
_RTTS = 8
"""Round trips of slow start that a far link gets beyond the time limit."""
_MAX_RTT_SECONDS = 0.25


class Rates(NamedTuple):
    """Bytes per second as seen from us."""

    up: float
    down: float


class Exchange:
    """One side of one probe.

    Args:
        sock: Connected, blocking; the caller closes it.
        config: Bounds on what we send and how long it takes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        sock: socket.socket,
        config: ProbeConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sock = sock
        self._config = config
        self._clock = clock
        self._ends = clock() + config.deadline_seconds
        self.sent_bytes = 0
        if sock.family in (socket.AF_INET, socket.AF_INET6) and hasattr(select, "poll"):
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _NOTSENT_BYTES)

    def ask(self, rtt_seconds: float) -> Rates:
        """Probe the peer and return what both directions carried.

        Raises:
            Unavailable: the peer wants to be asked later, or broke off.
            RemoteProtocolError: it does not keep to the exchange.
        """
        size = self._config.max_probe_bytes
        self._send(_REQUEST.pack(_MAGIC, size, size))
        status, wait = _ANSWER.unpack(self._receive(_ANSWER.size))
        if status:
            raise Unavailable(
                f"the peer serves probes again in {wait} s", code="E_BUSY"
            )
        self._send_burst(size, rtt_seconds)
        up = self._receive_rate()
        return Rates(up, self._receive_burst(size))

    def answer(self, may_wait: Callable[[], float], rtt_seconds: float) -> Rates | None:
        """Serve one probe; None if it was refused.

        Args:
            may_wait: Return 0 to serve it, or the seconds until it may be asked again.
            rtt_seconds: Of the link, as far as known.
        """
        magic, theirs, wanted = _REQUEST.unpack(self._receive(_REQUEST.size))
        if magic != _MAGIC:
            raise RemoteProtocolError("not a probe")
        wait = may_wait()
        self._send(_ANSWER.pack(bool(wait > 0), int(wait + 1) if wait > 0 else 0))
        if wait > 0:
            return None
        bound = self._config.max_probe_bytes
        down = self._receive_burst(min(theirs, bound))
        self._send_burst(min(wanted, bound), rtt_seconds)
        return Rates(self._receive_rate(), down)

    def _send_burst(self, size: int, rtt_seconds: float) -> None:
        far = _RTTS * min(max(rtt_seconds, 0.0), _MAX_RTT_SECONDS)
        seconds = self._config.max_probe_seconds + far
        stop = self._clock() + seconds
        piece = _LENGTH.pack(_PIECE_BYTES) + bytes(_PIECE_BYTES)
        left = size
        while left >= len(piece) and self._clock() < stop and not self._answered():
            self._send(piece)
            left -= len(piece)
        self._send(_LENGTH.pack(0))

    def _answered(self) -> bool:
        return bool(select.select([self._sock], [], [], 0)[0])

    def _receive_burst(self, size: int) -> float:
        """Return the rate of a burst of at most ``size`` bytes, and tell the sender."""
        arrivals: list[Arrival] = []
        buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
        total, told = 0, False
        while (length := _LENGTH.unpack(self._receive(_LENGTH.size))[0]) > 0:
            total += length + _LENGTH.size
            if length > len(buffer) or total > size + _LENGTH.size:
                raise RemoteProtocolError(f"a probe of more than {size} B")
            self._fill(buffer[:length])
            arrivals.append((self._clock(), total))
            if not told and len(arrivals) % _STABLE_EVERY == 0 and is_stable(arrivals):
                self._send(_RATE.pack(_ENOUGH))
                told = True
        rate = estimate(arrivals)
        self._send(_RATE.pack(int(min(rate, _MAX_RATE))))
        return rate

    def _receive_rate(self) -> float:
        rate = _RATE.unpack(self._receive(_RATE.size))[0]
        if rate == _ENOUGH:
            rate = _RATE.unpack(self._receive(_RATE.size))[0]
        if rate > _MAX_RATE:
            raise RemoteProtocolError(f"a rate of {rate} B/s")
        return float(rate)

    def _send(self, data: bytes) -> None:
        self._bound()
        self._sock.sendall(data)
        self.sent_bytes += len(data)

    def _receive(self, size: int) -> bytes:
        buffer = bytearray(size)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    def _fill(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            self._bound()
            count = self._sock.recv_into(view[got:])
            if not count:
                raise Unavailable("the peer broke off a probe")
            got += count

    def _bound(self) -> None:
        left = self._ends - self._clock()
        if left <= 0:
            raise PeerTimeout(f"a probe took {self._config.deadline_seconds} s")
        self._sock.settimeout(left)
