"""What a session does all the time: close, publish and check what changed."""

from __future__ import annotations

import logging

import trio

from fabric.app.session import Session
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, short
from fabric.net.ping import ping

log = logging.getLogger(__name__)

GATE_SECONDS = 1.0
"""How often connections of peers that lost their standing are closed."""


RECORD_SECONDS = 3.0
"""Least pause between two records of ours: addresses change several at once."""
CHECK_SECONDS = 2.0
"""A control connection answers a ping within this, or is closed and dialled anew."""
MAX_CHECKS = 32


async def close_refused(session: Session) -> None:
    """Close the connections of peers that the gate no longer allows."""
    while True:
        for peer, decision in session.gate.changes():
            log.info("gate.closed peer=%s code=%s", short(peer), decision.code)
            await session.disconnect(peer)
        await trio.sleep(GATE_SECONDS)


async def refresh_record(session: Session) -> None:
    """Publish our membership record when it changed, and every refresh period."""
    fresh_until = 0.0
    while True:
        now = trio.current_time()
        stale = now >= fresh_until
        if session.store.authority.membership(session.own).allowed and (
            stale or session.record_changed()
        ):
            try:
                await session.publish_record()
            except FabricError as exc:
                log.warning("record.failed code=%s reason=%s", exc.code, exc.reason)
            else:
                fresh_until = now + session.config.mesh.record_refresh_seconds
                await trio.sleep(RECORD_SECONDS)
        await trio.sleep(GATE_SECONDS)


async def check_lost(session: Session, nursery: trio.Nursery) -> None:
    """After RPC broke, see whether the control connection is alive; else drop it."""
    limiter = trio.CapacityLimiter(MAX_CHECKS)
    with session.rpc.lost() as lost:
        async for peer in lost:
            if limiter.available_tokens > 0:  # else its own keepalive finds out
                nursery.start_soon(_check, session, peer, limiter)


async def _check(session: Session, peer: PeerId, limiter: trio.CapacityLimiter) -> None:
    async with limiter:
        while kinds := [info.kind for info in session.host.connections(peer)]:
            try:
                with trio.fail_after(CHECK_SECONDS):
                    await ping(session.host, peer)
            except (FabricError, trio.TooSlowError):
                log.info("control.dead peer=%s kind=%s", short(peer), kinds[0])
                await session.host.close_connections(peer, kinds[0])
            else:
                return
