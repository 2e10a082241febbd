"""The control API's verbs about the network: ping and doctor."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec
import trio

from fabric.app import control_messages as m
from fabric.app.diagnose import collect
from fabric.app.explain import connection_kinds, path_of
from fabric.app.session import HELLO, Session
from nat.doctor.core import diagnose

PING_SECONDS = 10.0
MAX_PINGS = 100_000
"""A day of ``fabric ping --watch``; whoever watches longer starts again."""
MAX_INTERVAL_SECONDS = 60.0

Results = AsyncGenerator[msgspec.Struct, None]


async def ping(session: Session, request: m.Ping) -> Results:
    """Yield round trips; the first may connect, so it may take long.

    Raises:
        FabricError: no such member, or no path to it.
    """
    before: m.PingView | None = None
    for index in range(min(request.count, MAX_PINGS)):
        if index and request.interval_seconds > 0:
            await trio.sleep(min(request.interval_seconds, MAX_INTERVAL_SECONDS))
        view = await _round_trip(session, request, before)
        yield view
        before = view


async def _round_trip(
    session: Session, request: m.Ping, before: m.PingView | None
) -> m.PingView:
    peer = session.resolve(request.peer)
    with trio.fail_after(PING_SECONDS):
        if peer not in session.rpc.connected():
            await session.rpc.call(peer, HELLO, b"")  # a dial is no round trip
        started = trio.current_time()
        await session.rpc.call(peer, HELLO, b"")
    rtt = (trio.current_time() - started) * 1000
    view = m.PingView(
        peer, path_of(session, peer), rtt, connection_kinds(session, peer)
    )
    if before is None or before.path == view.path:
        return view
    return msgspec.structs.replace(view, before=before.path, before_ms=before.rtt_ms)


async def findings(session: Session, subject: str) -> Results:
    """Yield the doctor's findings; with ``subject`` the chain towards that peer too.

    Raises:
        Unavailable: no member, or several, match ``subject``.
    """
    peer = session.resolve(subject) if subject else None
    for finding in diagnose(await collect(session, peer)):
        yield finding
