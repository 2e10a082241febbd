"""What the kernel knows of a TCP connection (Linux), and the rate it may send at."""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import suppress

import msgspec

SO_MAX_PACING_RATE = 47
"""asm-generic/socket.h; Python has no name for it."""
UNPACED = 2**64 - 1
"""The kernel's word for no limit."""
CLOSED = 7
"""TCP_CLOSE (net/tcp_states.h): reset, timed out, or closed by both sides."""

# struct tcp_info (linux/tcp.h): state at 0, probes at 3, unacked at 24, last_ack_recv
# at 56, rtt (us) at 68, bytes_acked and bytes_received at 120, notsent_bytes at 144,
# min_rtt (us) at 148, delivery_rate at 160
_LAYOUT = struct.Struct("=BxxB20xI28xI8xI48xQQ8xII8xQ")


class TcpInfo(msgspec.Struct, frozen=True):
    """One look at a connection.

    Attributes:
        state: As in net/tcp_states.h; 1 is ESTABLISHED.
        probes: Zero-window or keepalive questions without an answer.
        unacked: Segments sent and not acknowledged.
        last_ack_milliseconds: Since anything was acknowledged to us.
        rtt_microseconds: Smoothed round trip.
        bytes_acked: What the peer has.
        bytes_received: What we have.
        notsent_bytes: Written and waiting in the kernel: somebody wants to send.
        min_rtt_microseconds: Least round trip seen lately.
        delivery_rate: Bytes per second of the latest acknowledged flight.
    """

    state: int
    probes: int
    unacked: int
    last_ack_milliseconds: int
    rtt_microseconds: int
    bytes_acked: int
    bytes_received: int
    notsent_bytes: int
    min_rtt_microseconds: int
    delivery_rate: int

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self.state == CLOSED


def is_tcp(sock: socket.socket) -> bool:
    """Return whether :func:`tcp_info` can ask about ``sock``."""
    return sys.platform == "linux" and sock.family in (socket.AF_INET, socket.AF_INET6)


def tcp_info(sock: socket.socket) -> TcpInfo:
    """Return what the kernel knows of ``sock``, for which :func:`is_tcp` holds.

    Raises:
        OSError: it is closed.
    """
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAYOUT.size)
    return TcpInfo(*_LAYOUT.unpack(raw.ljust(_LAYOUT.size, b"\0")))


def set_pacing(sock: socket.socket, bytes_per_second: float | None) -> None:
    """Limit what ``sock`` sends, also through copies of it in other processes.

    TCP paces itself where no fq queue does (net/core/sock.c, SK_PACING_NEEDED).

    Args:
        sock: For which :func:`is_tcp` holds; others are left alone.
        bytes_per_second: None lifts the limit.
    """
    if not is_tcp(sock):
        return
    rate = UNPACED if bytes_per_second is None else max(1, int(bytes_per_second))
    with suppress(OSError):  # closed meanwhile
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", rate))
