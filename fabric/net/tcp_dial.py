"""TCP connections to whichever of a peer's addresses answers first."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from fabric.core.errors import NoRoute, Unavailable
from fabric.net.offers import format_address
from fabric.net.port_reuse import CONNECT_SECONDS
from fabric.net.socket_options import set_liveness

SECOND_AFTER_SECONDS = 0.1
"""Head start of the first choice: a second one costs the other end more."""


async def connect_any(
    targets: Sequence[tuple[str, int]], second: Sequence[tuple[str, int]] = ()
) -> trio.socket.SocketType:
    """Return the first connection that any of ``targets`` accepts; all at once.

    Args:
        targets: First choice.
        second: Dialled too after a moment, or once all ``targets`` have failed.

    Raises:
        NoRoute: none did; the reason lists each address and its error.
    """
    dials = _Dials()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dials.run, targets, nursery.cancel_scope)
            if second:
                with trio.move_on_after(SECOND_AFTER_SECONDS):
                    await dials.over.wait()
                if dials.winner is None:
                    await dials.run(second, nursery.cancel_scope)
    except BaseException:
        if dials.winner is not None:
            dials.winner.close()
        raise
    if dials.winner is None:
        failures = "; ".join(dials.failures)
        raise NoRoute(f"no data-plane address answers: {failures}")
    return dials.winner


class _Dials:
    """The winner so far, and why the others lost."""

    def __init__(self) -> None:
        self.winner: trio.socket.SocketType | None = None
        self.failures: list[str] = []
        self.over = trio.Event()

    async def run(
        self, targets: Sequence[tuple[str, int]], race: trio.CancelScope
    ) -> None:
        """Dial ``targets``; the first that accepts ends ``race``."""
        async with trio.open_nursery() as nursery:
            for ip, port in targets:
                nursery.start_soon(self._attempt, ip, port, race)
        self.over.set()

    async def _attempt(self, ip: str, port: int, race: trio.CancelScope) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            with trio.fail_after(CONNECT_SECONDS):
                await sock.connect((ip, port))
            set_liveness(sock, patient=True)
            if self.winner is None:
                self.winner = sock
                race.cancel()
        except (OSError, trio.TooSlowError) as exc:
            self.failures.append(f"{format_address(ip, port)}: {_why(exc)}")
        finally:
            if sock is not self.winner:
                sock.close()


def _why(error: OSError | trio.TooSlowError) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {CONNECT_SECONDS:g} s"
    return error.strerror or str(error)


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
