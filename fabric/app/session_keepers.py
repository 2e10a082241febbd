"""What a session does all the time: close, publish and check what changed."""

from __future__ import annotations

import logging

import trio

from fabric.app.session import Session
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, short

log = logging.getLogger(__name__)

GATE_SECONDS = 1.0
"""How often connections of peers that lost their standing are closed."""


RECORD_SECONDS = 3.0
"""Least pause between two records of ours: addresses change several at once."""


async def close_refused(session: Session) -> None:
    """Close the connections of peers that the gate no longer allows."""
    while True:
        for peer, decision in session.gate.changes():
            log.info("gate.closed peer=%s code=%s", short(peer), decision.code)
            await session.disconnect(peer)
        await trio.sleep(GATE_SECONDS)


def needed_peers(session: Session) -> frozenset[PeerId]:
    """Return whose connections must stay although nobody uses them now.

    Of participants of our jobs, who may be busy for long; of relays of ours, and of
    those whom we relay. Not of rendezvous points: they are dialled when asked, for all
    members have the same ones.
    """
    nat = session.nat.service
    participants = session.running_jobs().values()
    return frozenset(
        (
            *(peer for peers in participants for peer in peers),
            *(peer for peer in session.host.connected() if nat.relays_with(peer)),
        )
    )


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
