"""TCP connections to whichever of a peer's addresses answers first."""

from __future__ import annotations

import socket

import trio

from fabric.core.errors import NoRoute, Unavailable
from fabric.net.offers import format_address
from fabric.net.socket_options import set_liveness


async def connect_any(targets: list[tuple[str, int]]) -> trio.socket.SocketType:
    """Return the first connection that any of ``targets`` accepts; all at once.

    Raises:
        NoRoute: none did; the reason lists each address and its error.
    """
    winner: list[trio.socket.SocketType] = []
    failures: list[str] = []

    async def attempt(ip: str, port: int, scope: trio.CancelScope) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await sock.connect((ip, port))
            set_liveness(sock, patient=True)
            if not winner:
                winner.append(sock)
                scope.cancel()
        except OSError as exc:
            failures.append(f"{format_address(ip, port)}: {exc.strerror or exc}")
        finally:
            if sock not in winner:
                sock.close()

    try:
        async with trio.open_nursery() as nursery:
            for ip, port in targets:
                nursery.start_soon(attempt, ip, port, nursery.cancel_scope)
    except BaseException:
        for sock in winner:
            sock.close()
        raise
    if not winner:
        raise NoRoute("no data-plane address answers: " + "; ".join(failures))
    return winner[0]


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    """Send all of ``data``.

    Raises:
        Unavailable: the connection broke.
    """
    try:
        while data:
            data = data[await sock.send(data) :]
    except OSError as exc:
        raise Unavailable(f"connection broke: {exc}") from exc
