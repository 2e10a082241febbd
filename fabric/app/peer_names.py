"""What a person calls a peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.core.ids import PeerId, short

if TYPE_CHECKING:
    from fabric.app.session import Session


def name_of(session: Session, peer: PeerId) -> str:
    """Return what a person calls ``peer``: its name if no other has it."""
    members = session.store.members.ever()
    record = members.get(peer)
    if record is None or sum(r.name == record.name for r in members.values()) > 1:
        return short(peer)
    return record.name or short(peer)
