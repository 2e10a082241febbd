"""A row of ``fabric trust list``; apart from what makes it, which is heavier."""

from __future__ import annotations

from typing import Literal

import msgspec

from fabric.core.ids import PeerId


class TrustRow(msgspec.Struct, frozen=True, kw_only=True):
    """One reason why a peer is, or was, a member; or one invite.

    Attributes:
        kind: "grant", "invited" (by redeeming an invite) or "invite".
        subject: The member, or the public key of the invite.
        role: What it gives.
        by: PeerId that signed it: the root, an owner or admin, or the invite's key.
        since: Wall seconds of its signature.
        until: Wall seconds at which it ends; None: it does not.
        uses: Of an invite, how often it may be used.
        used: Of an invite, how often it was.
        code: Empty while it stands, else why not ("E_REVOKED", ...).
        reason: The same in words.
    """

    kind: Literal["grant", "invited", "invite"]
    subject: PeerId
    role: str
    by: PeerId
    since: float
    until: float | None = None
    uses: int | None = None
    used: int | None = None
    code: str = ""
    reason: str = ""
