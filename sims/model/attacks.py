"""What hostile peers send: each kind of the research report, made with real keys.

The attacker is a member (it has a valid worker key) and knows every entry that was ever
pushed. Nothing it sends may change what honest authors wrote.
"""

from __future__ import annotations

import random

from crdt_store.clock import stamp
from crdt_store.entry import Entry, sign_entry
from fabric.core.ids import MeshId, PeerId
from fabric.core.signing import Signer

KINDS = (
    "forge",
    "bit_flip",
    "unauthorised",
    "foreign_slot",
    "replay",
    "future",
    "wrong_mesh",
    "garbage",
    "equivocation",
)
_MAX_HEARD = 500
_MAX_FUTURE_SECONDS = 7200.0


class _Forger:
    """Signs with one key and claims another."""

    def __init__(self, signer: Signer, victim: bytes, peer_id: PeerId) -> None:
        self._signer = signer
        self.public_key = victim
        self.peer_id = peer_id

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        """Return a signature that does not match the claimed key."""
        return self._signer.sign(domain, payload)


class Attacker:
    """Makes hostile messages.

    Args:
        rng: Its choices.
        mesh: The mesh it attacks.
        member: Its own key, a worker's.
        stranger: A key without any grant.
        victims: Keys of honest members.
    """

    def __init__(
        self,
        rng: random.Random,
        mesh: MeshId,
        member: Signer,
        stranger: Signer,
        victims: list[Signer],
    ) -> None:
        self._rng = rng
        self._mesh = mesh
        self._member = member
        self._stranger = stranger
        self._victims = victims
        self._heard: list[bytes] = []

    def hear(self, entry: Entry) -> None:
        """Remember an honest entry."""
        if len(self._heard) < _MAX_HEARD:
            self._heard.append(entry.raw)
        else:
            self._heard[self._rng.randrange(_MAX_HEARD)] = entry.raw

    def messages(self, kind: str, wall: float) -> list[bytes]:
        """Return the entries of one attack; each goes to other peers.

        Args:
            kind: One of ``KINDS``.
            wall: What clocks show.
        """
        rng, me = self._rng, self._member
        victim = rng.choice(self._victims)
        now, value = stamp(wall), rng.randbytes(16)
        mine = f"p/attack/{me.peer_id}"
        match kind:
            case "garbage":
                return [rng.randbytes(rng.randrange(1, 400))]
            case "bit_flip" | "replay" if self._heard:
                raw = rng.choice(self._heard)
                return [raw if kind == "replay" else _flipped(rng, raw)]
            case "forge":
                forger = _Forger(me, victim.public_key, victim.peer_id)
                key = f"p/0/{victim.peer_id}"
                return [sign_entry(forger, self._mesh, key, now, 0, value).raw]
            case "unauthorised":
                key = f"m/{self._stranger.peer_id}"
                return [sign_entry(self._stranger, self._mesh, key, now, 0, value).raw]
            case "foreign_slot":
                key = f"m/{victim.peer_id}"
                return [sign_entry(me, self._mesh, key, now, 0, value).raw]
            case "wrong_mesh":
                other = MeshId(rng.randbytes(32).hex())
                return [sign_entry(me, other, mine, now, 0, value).raw]
            case "future":
                later = stamp(wall + 61.0 + rng.random() * _MAX_FUTURE_SECONDS)
                return [sign_entry(me, self._mesh, mine, later, 0, value).raw]
            case _:
                values = (value, rng.randbytes(16))
                key = f"p/two/{me.peer_id}"
                return [sign_entry(me, self._mesh, key, now, 0, v).raw for v in values]


def _flipped(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
