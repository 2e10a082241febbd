"""How a run's mesh begins: its keys, its owner, and who is a member from the start."""

from __future__ import annotations

from dataclasses import dataclass

from crdt_store.clock import stamp
from crdt_store.entry import Entry, sign_entry
from crdt_store.grants import Grant, Mesh, create_mesh, sign_grant
from crdt_store.roles import Role
from crdt_store.views import MEMBER_TTL_SECONDS, MemberRecord, Values
from fabric.core.signing import Ed25519Signer
from sims.engine.randomness import key
from sims.peers.node import EPOCH

_MEMBER: Values[MemberRecord] = Values(MemberRecord)
_AGE_SECONDS = 100.0
"""The mesh is this old when the run begins."""


@dataclass(frozen=True)
class Founding:
    """A mesh and its first members.

    Attributes:
        mesh: Name and root.
        signers: Of the peers, by number; the first is the owner.
        entries: Their grants, the owner's first.
        grants: Of peers 1 and up, by number: also of those who join later.
    """

    mesh: Mesh
    signers: list[Ed25519Signer]
    entries: list[Entry]
    grants: dict[int, Entry]


def found(seed: int, num_peers: int, late: frozenset[int]) -> Founding:
    """Return a mesh of ``num_peers``, those in ``late`` not yet members."""
    signers = [key(seed, f"peer-{n}") for n in range(num_peers)]
    born = EPOCH - _AGE_SECONDS
    mesh, first = create_mesh("sim", key(seed, "root"), signers[0].peer_id, born)
    hlc = stamp(born + 1)
    grants = {
        n: sign_grant(signers[0], mesh.id, signer.peer_id, Grant(Role.WORKER), hlc)
        for n, signer in enumerate(signers)
        if n and n not in late
    }
    return Founding(mesh, signers, [first, *grants.values()], grants)


def member_record(number: int, incarnation: int) -> bytes:
    """Return what peer ``number`` publishes about itself: of usual size."""
    address = f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    record = MemberRecord(
        name=f"peer-{number}",
        addrs=(f"{address}/tcp/4001", f"{address}/udp/4001/quic-v1"),
        version="0.1.0",
        incarnation=incarnation,
    )
    return _MEMBER.encode(record)


def first_records(founding: Founding) -> list[Entry]:
    """Return the member records of the first members."""
    hlc = stamp(EPOCH - _AGE_SECONDS + 2)
    return [
        sign_entry(
            signer,
            founding.mesh.id,
            f"m/{signer.peer_id}",
            hlc,
            MEMBER_TTL_SECONDS,
            member_record(number, 1),
        )
        for number, signer in enumerate(founding.signers)
        if not number or number in founding.grants
    ]
