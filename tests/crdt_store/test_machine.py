"""Whole replicas with disks and clocks of their own, under everything at once.

Five peers write, crash, restart, see their clocks jump, are cut off, gossip lossily and
reconcile; one gets its grant late, one is revoked, an authorised liar equivocates, and
attackers forge, replay and scribble. What must hold is said by ``whole`` after each
step and by ``teardown``: all agree, and no acknowledged write is lost.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from crdt_store.clock import MAX_FUTURE_SECONDS, stamp
from crdt_store.entry import Entry, sign_entry
from crdt_store.grants import KEPT_ID_BYTES, REVOCATION_PREFIX, Mesh, Revocation
from crdt_store.memory_storage import MemoryStorage
from crdt_store.outcome import Outcome
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from crdt_store.replica import Replica
from crdt_store.roles import Role
from fabric.core.signing import Ed25519Signer
from tests.crdt_store.conftest import World, key_of

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
KEYS = [f"j/{n}/st" for n in range(4)]
NUM_PEERS = 5
STEADY = (2, 3, 4)
"""Peers whose clocks are right; only they write what expires."""
REVOKED, LATE = 3, 4
WHO = st.integers(0, NUM_PEERS - 1)
KEY = st.sampled_from(KEYS)
FATES = st.sampled_from(["deliver", "repeat", "drop"])
CRASHES = st.sampled_from(["", "signed", "written"])


class Peer:
    """What the shell does, without trio: sign, mark, commit, apply."""

    def __init__(self, world: World, signer: Ed25519Signer) -> None:
        self.world, self.signer = world, signer
        self.disk = MemoryStorage()
        self.offset = 0.0
        self.last_signed = 0
        self.restart()
        self.replica.ingest_batch_untrusted(world.authority(), world.now)
        self.flush()

    @property
    def now(self) -> float:
        return self.world.now + self.offset

    def restart(self) -> None:
        """Come back with what the disk has; the rest of memory is gone."""
        self.replica = Replica(
            self.world.mesh, self.signer.public_key, clock_mark=self.disk.high_water()
        )
        self.replica.restore(self.disk.load(), self.now)
        self.newest: dict[tuple, int] = {}  # by slot, of entries seen since the start

    def flush(self, *own: Entry) -> None:
        """One transaction, as the committer's: with what is ours goes its authority."""
        changes = self.replica.take_changes()
        upserts = changes.upserts | {entry.slot: entry for entry in own}
        self.disk.write(tuple(upserts.values()), tuple(changes.deletes))

    def put(self, key: str, value: bytes, ttl: int, crash: str) -> Entry | None:
        """Return the acknowledged entry, or None."""
        replica, now = self.replica, self.now
        entry = replica.sign(self.signer, key, value, ttl, now)
        if replica.authority.refusal(entry) or entry.seconds > now + MAX_FUTURE_SECONDS:
            return None
        mark = replica.clock.mark_to_save(now)
        if mark is not None:
            self.disk.save_high_water(mark)
            replica.clock.saved(mark)
        assert entry.hlc > self.last_signed
        self.last_signed = entry.hlc
        if crash == "signed":
            self.restart()
            return None
        self.flush(entry)
        if crash == "written":
            self.restart()
        else:
            assert replica.commit_own(entry, now)
        assert self.replica.slots.get(entry.slot) == entry
        return entry

    def take(self, raws) -> None:
        self.replica.ingest_batch_untrusted(raws, self.now)

    def sync(self, other: Peer, salt: int, cut: int | None = None) -> None:
        session = Session(self.replica, salt.to_bytes(8, "big"))
        while (data := session.next_request()) is not None:
            request = parse_request_untrusted(data)
            other.take(getattr(request, "entries", ()))
            if cut is not None and session.num_requests >= cut:
                return  # the response is lost
            self.take(session.receive_untrusted(answer(other.replica, request)))


def view(replica: Replica) -> tuple:
    return replica.state_hash(), {entry.slot: entry.id for entry in replica.slots}


class Mesh5(RuleBasedStateMachine):
    @initialize()
    def found(self) -> None:
        self.world = World()
        signers = [*self.world.workers, key_of(50)]
        self.peers = [Peer(self.world, signer) for signer in signers]
        self.flying: list[bytes] = []
        self.seen: list[bytes] = []
        self.acknowledged: dict[tuple, Entry] = {}
        self.sides = [0] * NUM_PEERS
        self.salt = itertools.count(1)
        self.granted = self.revoked = False

    # --- what peers do

    @rule(
        who=WHO,
        key=KEY,
        value=st.binary(max_size=3),
        ttl=st.sampled_from([0, 0, 40, 400]),
        crash=CRASHES,
    )
    def write(self, who, key, value, ttl, crash) -> None:
        peer = self.peers[who]
        entry = peer.put(key, value, ttl if who in STEADY else 0, crash)
        if entry is not None:
            self.acknowledged[entry.slot] = entry
            self.flying.append(entry.raw)
            self.seen.append(entry.raw)

    @rule(seconds=st.floats(0, 120))
    def wait(self, seconds) -> None:
        self.world.now += seconds
        for peer in self.peers:
            peer.replica.tick(peer.now)

    @rule(who=st.sampled_from([0, 1]), offset=st.floats(-100, 100))
    def jump(self, who, offset) -> None:
        self.peers[who].offset = offset

    @rule(who=WHO, flushed=st.booleans())
    def crash(self, who, flushed) -> None:
        if flushed:
            self.peers[who].flush()
        self.peers[who].restart()

    @rule(who=WHO)
    def commit(self, who) -> None:
        self.peers[who].flush()

    # --- what the network does

    @rule(sides=st.lists(st.integers(0, 1), min_size=NUM_PEERS, max_size=NUM_PEERS))
    def partition(self, sides) -> None:
        self.sides = sides

    @precondition(lambda self: self.flying)
    @rule(to=WHO, data=st.data(), fate=FATES)
    def push(self, to, data, fate) -> None:
        at = data.draw(st.integers(0, len(self.flying) - 1))
        if fate != "drop":
            self.peers[to].take([self.flying[at]])
        if fate != "repeat":
            self.flying.pop(at)

    @rule(one=WHO, other=WHO, cut=st.none() | st.integers(1, 4))
    def sync(self, one, other, cut) -> None:
        if one != other and self.sides[one] == self.sides[other]:
            self.peers[one].sync(self.peers[other], next(self.salt), cut)

    # --- what administrators do

    @precondition(lambda self: not self.granted)
    @rule(to=WHO)
    def grant_late(self, to) -> None:
        late = self.peers[LATE].signer
        at = self.peers[to].now
        grant = self.world.grant(self.world.owner, late, Role.WORKER, at=at)
        self.peers[to].take([grant.raw])
        self.peers[to].flush()  # its author waited for this
        self.granted = True

    @precondition(lambda self: not self.revoked)
    @rule(by=st.sampled_from([0, 1, 2]))
    def revoke(self, by) -> None:
        """As ``Administration.revoke``, from what one peer happens to hold."""
        culprit = self.peers[REVOKED].signer
        held = self.peers[by].replica.slots.authored(culprit.public_key)
        kept = tuple(sorted(entry.id[:KEPT_ID_BYTES] for entry in held))
        cut = max((entry.hlc for entry in held), default=0)
        revocation = self.world.record(
            self.world.admin,
            REVOCATION_PREFIX + culprit.peer_id,
            Revocation(cut, "", kept),
            at=self.peers[by].now,  # ours are never held as from the future
        )
        self.peers[by].take([revocation.raw])
        self.peers[by].flush()
        self.revoked, self.kept = True, {entry.id for entry in held}

    # --- what enemies do

    @rule(to=st.lists(WHO, min_size=2, max_size=2), key=KEY)
    def equivocate(self, to, key) -> None:
        """An authorised author tells two peers different things."""
        liar, hlc = self.world.admin, stamp(self.world.now)
        for peer, value in zip(to, (b"x", b"y"), strict=True):
            self.peers[peer].take([self.world.entry(liar, key, value, hlc=hlc).raw])

    @rule(
        to=WHO,
        kind=st.sampled_from(
            [
                "forged",
                "flipped",
                "unauthorised",
                "foreign",
                "replayed",
                "future",
                "mesh",
                "garbage",
            ]
        ),
        data=st.data(),
    )
    def attack(self, to, kind, data) -> None:
        peer = self.peers[to]
        raw = self._evil(kind, peer, data)
        if raw is None:
            return
        before = view(peer.replica)
        outcome = peer.replica.ingest_untrusted(raw, peer.now)
        assert outcome is not Outcome.ACCEPTED
        assert view(peer.replica) == before

    def _evil(self, kind, peer, data) -> bytes | None:
        world = self.world
        worker, victim = world.workers[0], world.workers[1]
        good = world.entry(worker, KEYS[0], b"evil").raw
        match kind:
            case "forged":
                raw = world.entry(world.stranger, KEYS[0]).raw
                return raw.replace(world.stranger.public_key, victim.public_key)
            case "flipped":
                at = data.draw(st.integers(0, 63))
                return good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
            case "unauthorised":
                return world.entry(world.stranger, KEYS[0]).raw
            case "foreign":
                return world.entry(worker, f"m/{victim.peer_id}").raw
            case "replayed":
                raw = data.draw(st.sampled_from(self.seen or [b""]))
                return raw if raw in {e.raw for e in peer.replica.slots} else None
            case "future":
                return world.entry(worker, KEYS[0], at=world.now + 1e7).raw
            case "mesh":
                other = Mesh("other", world.root.public_key).id
                return sign_entry(worker, other, KEYS[0], stamp(world.now), 0, b"").raw
            case _:
                return data.draw(st.binary(max_size=100))

    # --- what must hold

    @invariant()
    def whole(self) -> None:
        for number, peer in enumerate(getattr(self, "peers", [])):
            peer.replica.check_integrity()  # authorised only, among others
            for entry in peer.replica.slots:
                assert entry.signature_matches()
                assert entry.seconds <= peer.now + MAX_FUTURE_SECONDS + 200  # jumps
                if number in STEADY and entry.author != self._culprit():
                    # no resurrection: what was replaced does not come back
                    assert entry.hlc >= peer.newest.get(entry.slot, 0)
                    peer.newest[entry.slot] = entry.hlc
            self._own_slots(number, peer)

    def _culprit(self) -> bytes:
        return self.peers[REVOKED].signer.public_key if self.revoked else b""

    def _own_slots(self, number: int, peer: Peer) -> None:
        """Who wrote reads its own last write, until it expires."""
        if number == REVOKED and self.revoked:
            return
        for (key, author), entry in self.acknowledged.items():
            if author == peer.signer.public_key and entry.expires_at == math.inf:
                held = peer.replica.slots.get((key, author))
                assert held is not None
                assert held.hlc >= entry.hlc

    def teardown(self) -> None:
        if not hasattr(self, "peers"):
            return
        self.world.now += 300  # what was held from the future is due
        for peer in self.peers:
            peer.offset = 0.0
            peer.restart()
            peer.replica.tick(peer.now)
        for _ in range(2):
            for one, other in itertools.combinations(self.peers, 2):
                one.sync(other, next(self.salt))
        for peer in self.peers:
            peer.replica.tick(peer.now)
        self._agree()
        self._lost_nothing()

    def _agree(self) -> None:
        assert len({peer.replica.state_hash() for peer in self.peers}) == 1
        for peer in self.peers:
            offered = {e.slot for e in peer.replica.slots if e.fades_at > peer.now}
            assert offered == {
                e.slot for e in self.peers[0].replica.slots if e.fades_at > peer.now
            }
            if self.revoked:
                left = peer.replica.slots.authored(self._culprit())
                assert {entry.id for entry in left} <= self.kept

    def _lost_nothing(self) -> None:
        for slot, entry in self.acknowledged.items():
            if slot[1] == self._culprit() or entry.fades_at <= self.world.now:
                continue
            for peer in self.peers:
                held = peer.replica.slots.get(slot)
                assert held is not None
                assert held.order >= entry.order


@pytest.mark.slow
def test_five_peers_under_everything_converge_without_loss() -> None:
    run_state_machine_as_test(
        Mesh5,
        settings=settings(
            max_examples=30 * FACTOR,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate, Phase.explicit, Phase.reuse],  # shrinking: minutes
        ),
    )
