"""TCP options that every socket of both planes gets: small writes leave, death shows.

An uplink that changes (an address removed, a gateway swapped) says nothing to the
sockets that used it. What the kernel can tell apart: a machine that is gone sends no
ACK, a process that is stopped or busy still does. So no answer is death within
:data:`DEAD_AFTER_SECONDS`, and slow is not dead.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Protocol

KEEPALIVE_IDLE_SECONDS = 3
"""A connection silent for this long is asked; a job's peers talk more often."""
KEEPALIVE_INTERVAL_SECONDS = 1
"""Between two questions; a late answer to any of them counts."""
KEEPALIVE_COUNT = 4
"""Questions without an answer: some lost packets must not end a connection."""
USER_TIMEOUT_MILLISECONDS = 6000
"""Sent bytes may stay unacknowledged this long (RFC 5482, TCP_USER_TIMEOUT)."""
DEAD_AFTER_SECONDS = 8.0
"""Any call on a dead connection ends within this: 3 + 4 * 1 s, and a timer's slack."""


DOUBTED_IDLE_SECONDS = 1
DOUBTED_COUNT = 2
"""The same for a connection whose path may be dead: 1 + 2 * 1 s at most, and less where
it has been silent for a while already."""


class _HasOptions(Protocol):
    @property
    def family(self) -> int: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def set_liveness(sock: _HasOptions, *, patient: bool = False) -> None:
    """Let a dead peer be noticed within :data:`DEAD_AFTER_SECONDS`; nothing on Unix.

    Args:
        sock: Of any library that has stdlib names; may not be connected yet, and what
            a listener has its accepted sockets inherit.
        patient: The reader may pause (a worker that computes, a disk that writes).
            Linux ends a connection under TCP_USER_TIMEOUT also when the peer
            acknowledges but has no room for that long (tcp_timer.c, tcp_probe_timer),
            which would make slow dead. So a patient socket has no such timeout, and
            bytes that nobody acknowledges are noticed by
            :class:`fabric.net.pacing.SocketRegistry`, which tells these two apart.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPALIVE", KEEPALIVE_IDLE_SECONDS),  # macOS's name
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", KEEPALIVE_COUNT),
    ]
    timeout = 0 if patient else USER_TIMEOUT_MILLISECONDS
    options.append((socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", timeout))
    for level, name, value in options:
        option = getattr(socket, name, None)
        if option is not None:
            with suppress(OSError):  # a platform may know the name and not the option
                sock.setsockopt(level, option, value)


def set_doubt(sock: socket.socket, *, doubted: bool) -> None:
    """Have the kernel ask sooner whether the peer is there, or as usual again."""
    idle = DOUBTED_IDLE_SECONDS if doubted else KEEPALIVE_IDLE_SECONDS
    count = DOUBTED_COUNT if doubted else KEEPALIVE_COUNT
    options = (
        ("TCP_KEEPCNT", count),
        ("TCP_KEEPIDLE", idle),
        ("TCP_KEEPALIVE", idle),  # macOS's name
    )
    for name, value in options:
        option = getattr(socket, name, None)
        if option is not None:
            with suppress(OSError):  # closed, or no option of this platform
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
