"""The gate: default deny, refusals with a next step, what it tells the node."""

import random

import pytest

from attestation.gate import MembershipGate
from attestation.limits import AttemptLimits
from attestation.ports import MemoryVerdicts
from attestation.schedule import YIELD_SECONDS, Schedule
from attestation.standings import Standings
from attestation.states import Event, Tier
from fabric.core.ids import PeerId
from fabric.net.ports import (
    ALLOWED,
    PROTOCOL_ATTEST,
    PROTOCOL_OFFER,
    PROTOCOL_RPC,
    Decision,
)

OWN, P, Q = PeerId("own"), PeerId("p"), PeerId("q")


class World:
    def __init__(self, **options):
        self.now = 0.0
        self.members = {}
        self.verdicts = MemoryVerdicts()
        self.standings = Standings(600)
        self.gate = MembershipGate(
            lambda peer: self.members.get(peer, Decision(allowed=False)),
            self.verdicts,
            self.standings,
            lambda: self.now,
            own=OWN,
            **options,
        )

    def admit(self, peer):
        self.members[peer] = ALLOWED
        self.standings.apply(peer, Event.CHALLENGED)
        self.standings.accept(peer, Tier.SOFTWARE, 1200, self.now)


@pytest.mark.parametrize("protocol", [PROTOCOL_RPC, PROTOCOL_OFFER, "/anything/1", ""])
def test_a_stranger_may_only_attest(protocol):
    world = World()
    decision = world.gate.allows(P, protocol)
    assert not decision.allowed
    assert decision.code == "E_NOT_ADMITTED"
    assert decision.reason
    assert "fabric join TOKEN" in decision.next_step
    assert world.gate.allows(P, PROTOCOL_ATTEST).allowed


def test_membership_without_evidence_is_not_enough():
    world = World()
    world.members[P] = ALLOWED
    decision = world.gate.allows(P, PROTOCOL_RPC)
    assert (decision.allowed, decision.code) == (False, "E_NOT_ATTESTED")


def test_evidence_without_membership_is_not_enough():
    world = World()
    world.admit(P)
    exhausted = Decision(
        allowed=False, code="E_INVITE_EXHAUSTED", reason="used 1 of 1", next_step="ask"
    )
    world.members[P] = exhausted
    assert world.gate.allows(P, PROTOCOL_RPC) == exhausted


def test_an_admitted_member_and_ourselves_pass():
    world = World()
    world.admit(P)
    assert world.gate.allows(P, PROTOCOL_RPC).allowed
    assert world.gate.allows(OWN, PROTOCOL_RPC).allowed
    assert not world.gate.allows(Q, PROTOCOL_RPC).allowed


def test_suspect_keeps_connections_by_default_and_expired_does_not():
    lenient, strict = World(), World(allow_suspect=False)
    for world in (lenient, strict):
        world.admit(P)
        world.now = 950
    assert lenient.gate.allows(P, PROTOCOL_RPC).allowed
    assert not strict.gate.allows(P, PROTOCOL_RPC).allowed
    lenient.now = 1200
    assert lenient.gate.allows(P, PROTOCOL_RPC).code == "E_NOT_ATTESTED"


def test_changes_name_each_lost_peer_once():
    world = World()
    world.admit(P)
    world.admit(Q)
    world.gate.allows(P, PROTOCOL_RPC)
    world.gate.allows(Q, PROTOCOL_RPC)
    assert world.gate.changes() == []
    world.verdicts.revoked[P] = "key stolen"
    ((peer, decision),) = world.gate.changes()
    assert (peer, decision.code) == (P, "E_REVOKED")
    assert world.gate.changes() == []
    world.standings.apply(Q, Event.REJECTED, "other files")
    ((peer, decision),) = world.gate.changes()
    assert (peer, decision.code) == (Q, "E_QUARANTINED")
    assert "other files" in decision.reason


def test_a_flood_of_newcomers_leaves_room_for_members():
    limits = AttemptLimits(per_peer=6, newcomers=20, max_exchanges=8)
    begun = [
        PeerId(f"s{n}")
        for n in range(1000)
        if not limits.begin(PeerId(f"s{n}"), member=False, now=0.0)
    ]
    assert len(begun) == 6  # a quarter of the exchanges is kept for members
    assert limits.begin(P, member=True, now=0.0) == 0.0
    for peer in begun:
        limits.end(peer)
    served = 0
    for n in range(1000):
        peer = PeerId(f"t{n}")
        if not limits.begin(peer, member=False, now=0.0):
            served += 1
            limits.end(peer)
    assert served == 14
    assert limits.begin(PeerId("late"), member=False, now=0.0) == pytest.approx(3.0)
    assert limits.begin(Q, member=True, now=0.0) == 0.0


def test_one_peer_is_limited_and_recovers():
    limits = AttemptLimits(per_peer=6)
    for _ in range(6):
        assert limits.begin(P, member=True, now=0.0) == 0.0
        assert limits.begin(P, member=True, now=0.0) > 0, "one at a time"
        limits.end(P)
    assert limits.begin(P, member=True, now=0.0) == pytest.approx(10.0)
    assert limits.begin(P, member=True, now=10.0) == 0.0


def test_schedule_repeats_backs_off_and_yields():
    schedule = Schedule(OWN, 600, 0.2, random.Random(1))
    schedule.on_connected(P, 0.0, current=False)  # "own" < "p"
    schedule.on_connected(PeerId("a"), 0.0, current=False)
    assert schedule.due(0.0) == [P]
    assert schedule.due(0.0) == [], "a turn runs until its result is told"
    assert schedule.next_timeout() == YIELD_SECONDS
    schedule.on_failure(P, 0.0)
    first = schedule.next_timeout()
    assert first == YIELD_SECONDS
    assert schedule.due(2.0) == [PeerId("a")]
    waits = []
    now = 0.0
    for _ in range(12):
        now = schedule.next_timeout()
        assert schedule.due(now) == [P]
        schedule.on_failure(P, now)
        waits.append(schedule.next_timeout() - now)
    assert waits[0] < waits[3]
    assert max(waits) <= 300 * 1.2
    schedule.on_success(P, now)
    assert 480 <= schedule.next_timeout() - now <= 720
    schedule.on_disconnected(P)
    schedule.on_disconnected(PeerId("a"))
    assert schedule.next_timeout() is None
