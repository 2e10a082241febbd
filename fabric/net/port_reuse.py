"""Sockets that share one port: dials leave from the port that listens.

A NAT that maps by source alone then shows every peer the same external port, so the
address that one peer observes is where others can punch through (RFC 5128, section
3.3). Linux allows a bind to a listening port only when both sockets have SO_REUSEPORT;
the listener gets the option *after* it listens, so that a second daemon, which binds
without it, still learns that the port is taken.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable

import trio

from fabric.net.socket_options import set_liveness

CONNECT_SECONDS = 3.0
"""An address that is silent for this long is not tried any longer: a SYN and its first
repeat, after 1 s, were lost. What is dialled anew in between has newer addresses, and
the way through a relay, which waits for nobody."""
BACKLOG = 128
"""Connections that completed and were not accepted yet."""
_PORT_BUSY = frozenset(
    {errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EINVAL, errno.EACCES}
)
"""The reused port does not do for this target: the same pair of addresses and ports has
a connection already (or one that just ended), or the address cannot reach there."""
NO_SUCH_IP = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""The machine has no address of that kind, or has that kind of IP switched off."""

Source = tuple[str, int]
"""Address and port to bind before a dial; port 0 lets the system choose."""
EPHEMERAL: Source = ("", 0)


def listen_shared(ip: str, port: int) -> trio.SocketListener:
    """Return a listener whose port later dials may share; the port is ours alone.

    Raises:
        OSError: the address is not ours, or the port is taken (EADDRINUSE).
    """
    sock = trio.socket.from_stdlib_socket(_listening(ip, port))
    return trio.SocketListener(sock)


def _listening(ip: str, port: int) -> socket.socket:
    sock = socket.socket(_family(ip), socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        set_liveness(sock)  # what it accepts inherits these
        sock.bind((ip, port))
        sock.listen(BACKLOG)
        share(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def share(sock: socket.socket | trio.socket.SocketType) -> None:
    """Let ``sock`` share its port with sockets that say the same."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):  # not on Windows
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def source_for(target_ip: str, listening: Iterable[Source]) -> Source | None:
    """Return which of the ``listening`` addresses a dial to ``target_ip`` leaves from.

    A loopback listener is no source for other machines and the reverse; a wildcard is
    one for all of its family. None: an ephemeral port.
    """
    try:
        target = ipaddress.ip_address(target_ip)
    except ValueError:
        return None  # a name, or an address with a scope
    for ip, port in listening:
        own = ipaddress.ip_address(ip)
        if own.version != target.version:
            continue
        if own.is_unspecified or own.is_loopback == target.is_loopback:
            return ip, port
    return None


async def connect(ip: str, port: int, source: Source | None) -> trio.SocketStream:
    """Return a connection to ``ip``, from ``source`` where that is possible.

    Bound it with ``trio.fail_after`` at the call site.

    Raises:
        OSError: no connection.
    """
    if source is not None and source[1]:
        try:
            return await _connect(ip, port, source)
        except OSError as exc:
            if exc.errno not in _PORT_BUSY:
                raise
    return await _connect(ip, port, None)


async def _connect(ip: str, port: int, source: Source | None) -> trio.SocketStream:
    sock = trio.socket.socket(_family(ip), socket.SOCK_STREAM)
    try:
        if source is not None:
            share(sock)
            await sock.bind(source)
        await sock.connect((ip, port))
        set_liveness(sock)  # not before: how long a dial may take is the caller's
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET
