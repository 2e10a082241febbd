"""One core in any order of events: no rule of the state machine is ever broken."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from crdt_store.liveness.config import (
    CONFIRMATIONS,
    MAX_ASKED,
    MIN_ASKED,
    MISSED,
    LivenessConfig,
)
from crdt_store.liveness.core import MAX_AWARENESS, MAX_JUMP, Call, State, Swim
from crdt_store.liveness.losses import Losses
from crdt_store.liveness.messages import (
    CODEC,
    MAX_INCARNATION,
    Ack,
    Claim,
    Load,
    Ping,
    Report,
    Standing,
    check_alive,
    decode_untrusted,
    sign_alive,
)
from crdt_store.liveness.news import MAX_QUEUED
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import MeshId, PeerId
from fabric.core.signing import Ed25519Signer
from tests.crdt_store.liveness.fleet import seal_of

CONFIG = LivenessConfig()
ME = PeerId("me")
PEERS = [PeerId(f"peer{number}") for number in range(6)]

peers = st.sampled_from(PEERS)
anybody = st.sampled_from([*PEERS, ME, PeerId("stranger")])
incarnations = st.one_of(
    st.integers(0, 9), st.integers(MAX_JUMP - 1, MAX_JUMP + 9), st.just(MAX_INCARNATION)
)


@st.composite
def claims(draw):
    subject, incarnation = draw(anybody), draw(incarnations)
    standing = draw(st.sampled_from(Standing))
    honest = draw(st.booleans()) and standing is Standing.ALIVE
    seal = seal_of(subject, incarnation) if honest else b"forged"
    return Claim(subject, incarnation, standing, draw(anybody), seal)


loads = st.builds(Load, st.integers(0, 9), st.integers(0, 9))
reports = st.builds(Report, anybody, st.integers(0, 2**31 - 1), loads)
parts = {
    "incarnation": incarnations,
    "claims": st.lists(claims(), max_size=8).map(tuple),
    "load": loads,
    "reports": st.lists(reports, max_size=4).map(tuple),
}
pings = st.builds(Ping, **parts, target=anybody | st.just(""), intro=st.booleans())
acks = st.builds(Ack, **parts, reached=st.booleans())


def core(now=0.0, **terms):
    return Swim(
        ME,
        CONFIG,
        random.Random(terms.pop("seed", 0)),
        incarnation=0,
        sign=lambda incarnation: seal_of(ME, incarnation),
        verify=lambda peer, incarnation, seal: seal == seal_of(peer, incarnation),
        now=now,
    )


class Machine(RuleBasedStateMachine):
    """Members, strangers and liars, answers in any order, time that jumps."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.core = core()
        self.core.set_members(PEERS)
        self.calls: list[Call] = []
        self.relays: list[tuple[PeerId, Call]] = []
        self.incarnation = 0
        self.before: dict[PeerId, State] = {}

    def poll(self):
        for call in self.core.poll(self.now):
            assert call.peer in PEERS
            assert len(call.ping.claims) <= 7
            assert call.deadline > self.now
            self.calls.append(call)

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds):
        self.now += seconds
        self.poll()

    @rule(seconds=st.floats(10, 500))
    def sleep(self, seconds):
        """We did not run: by that time alone nobody dies."""
        before = self.core.dead
        self.now += seconds + max(0.0, self.core.next_timeout() - self.now)
        self.poll()
        assert self.core.dead <= before or seconds < 1

    @rule(peer=anybody, ping=pings)
    def ask(self, peer, ping):
        answer = self.core.receive(peer, ping, self.now)
        if isinstance(answer, Call):
            assert answer.peer == ping.target
            self.relays.append((peer, answer))
        else:
            CODEC.encode(answer)
        if peer in self.core._rounds:
            assert self.core.state(peer) in (State.ALIVE, State.SUSPECT)
        self.poll()

    @rule(data=st.data(), ack=acks, lost=st.booleans())
    def end_relay(self, data, ack, lost):
        if self.relays:
            at = data.draw(st.integers(0, len(self.relays) - 1))
            sender, call = self.relays.pop(at)
            answer = self.core.relayed(sender, call, None if lost else ack, self.now)
            assert answer.reached is not lost
            self.poll()

    @rule(data=st.data(), ack=acks, lost=st.booleans())
    def end_call(self, data, ack, lost):
        if self.calls:
            at = data.draw(st.integers(0, len(self.calls) - 1))
            call = self.calls.pop(at)
            if lost:
                self.core.failed(call, self.now)
            else:
                self.core.answered(call, ack, self.now)
            self.poll()

    @rule(peer=anybody)
    def connect(self, peer):
        self.core.connected(peer, self.now)
        assert peer not in self.core._rounds or self.core.state(peer) is State.ALIVE
        self.poll()

    @rule(peer=anybody)
    def lose(self, peer):
        self.core.broke(peer)
        self.poll()

    @rule(members=st.sets(peers))
    def change_members(self, members):
        self.core.set_members(members)
        self.poll()

    @invariant()
    def own_incarnation_never_falls(self):
        assert self.core.incarnation >= self.incarnation
        self.incarnation = self.core.incarnation

    @invariant()
    def everything_is_bounded(self):
        assert 0 <= self.core.awareness <= MAX_AWARENESS
        assert len(self.core._beliefs.news) <= MAX_QUEUED
        assert self.core.dead <= self.core._rounds.members
        assert set(self.core._beliefs.suspicions) <= self.core._rounds.members
        assert not self.core.dead & set(self.core._beliefs.suspicions)
        assert self.core.state(ME) is State.ALIVE
        assert self.core.num_members >= 1

    @invariant()
    def nobody_dies_without_having_been_suspected(self):
        now = {peer: self.core.state(peer) for peer in PEERS}
        for peer, state in now.items():
            if state is State.DEAD and peer in self.before:
                assert self.before[peer] in (State.SUSPECT, State.DEAD), peer
        self.before = now

    def teardown(self):
        """If everybody falls silent, all are dead in the end; time never stands."""
        members = set(self.core._rounds.members)
        end = self.now + 10 * CONFIG.ghost_bound_seconds(len(PEERS))
        while self.core.dead != members and self.now < end:
            due = min([self.core.next_timeout(), *(c.deadline for c in self.calls)])
            assert due < math.inf
            self.now = max(due, self.now + 0.01)
            over = [call for call in self.calls if call.deadline <= self.now]
            self.calls = [call for call in self.calls if call not in over]
            for call in over:
                self.core.failed(call, self.now)
            self.poll()
        assert self.core.dead == members


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMachine = pytest.mark.slow(TestMachine)


@given(st.integers(1, 10_000), st.integers(1, 10))
def test_more_accusers_never_mean_more_time(members, accusers):
    waits = [CONFIG.suspicion_seconds(members, n) for n in (accusers, accusers + 1)]
    assert waits[0] >= waits[1] - 1e-9
    assert waits[1] >= CONFIG.shortest_suspicion(members) - 1e-9
    assert CONFIG.suspicion_seconds(members, CONFIRMATIONS + 1) == pytest.approx(
        CONFIG.shortest_suspicion(members)
    )


def test_the_bound_grows_with_the_logarithm_of_the_mesh():
    by_ten = [CONFIG.ghost_bound_seconds(10**power) for power in range(1, 6)]
    steps = [b - a for a, b in itertools.pairwise(by_ten)]
    assert max(steps) - min(steps) < 1e-6


def accused_core(victim, liar):
    swim = core()
    swim.set_members(PEERS)
    lies = tuple(
        Claim(victim, 0, standing, PEERS[n])
        for n in range(2, 6)
        for standing in (Standing.SUSPECT, Standing.DEAD)
    )
    swim.receive(liar, Ping(0, lies), 0.0)
    assert swim.state(victim) is State.SUSPECT
    return swim


def test_who_alone_knows_of_a_refutation_looks_itself_when_a_death_is_told():
    """Nobody else's accusation of the older incarnation counts here."""
    ghost, other = PEERS[0], PEERS[1]
    swim = core()
    swim.set_members(PEERS)
    swim.receive(ghost, Ping(1), 0.0)
    now = 3 * CONFIG.period_seconds
    while swim.next_timeout() < now:
        swim.poll(swim.next_timeout())
    swim.poll(now)
    swim.receive(other, Ping(0, (Claim(ghost, 0, Standing.DEAD, other),)), now)
    assert swim.state(ghost) is not State.SUSPECT
    assert swim.has_more
    assert ghost in {call.peer for call in swim.poll(now)}


@pytest.mark.parametrize("answered", range(1, MIN_ASKED + 1))
def test_one_liar_kills_nobody_and_revives_nobody(answered):
    """Whichever of our calls the victim answers, it is alive."""
    victim, liar = PEERS[0], PEERS[1]
    swim = accused_core(victim, liar)
    now, asked = 0.0, []
    while len(asked) < answered:
        now = swim.next_timeout()
        calls = swim.poll(now)
        asked += [call for call in calls if call.peer == victim and not call.about]
        assert swim.state(victim) is State.SUSPECT
    last = asked[-1]
    assert any(claim.subject == victim for claim in last.ping.claims)
    swim.answered(last, Ack(0), now)
    assert swim.state(victim) is State.ALIVE
    forged = Claim(victim, 7, Standing.ALIVE, victim, b"forged")
    swim.receive(liar, Ping(0, (forged,)), now)
    assert swim.counts["bad_signature"] == 1


def test_who_answers_none_of_our_calls_is_dead_when_its_time_is_over():
    victim = PEERS[0]
    swim = accused_core(victim, PEERS[1])
    now, asked = 0.0, []
    while swim.state(victim) is State.SUSPECT:
        now = swim.next_timeout()
        calls = swim.poll(now)
        asked += [call for call in calls if call.peer == victim and not call.about]
    assert swim.state(victim) is State.DEAD
    assert len(asked) >= MIN_ASKED
    assert now == pytest.approx(CONFIG.shortest_suspicion(7), abs=0.01)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_the_more_is_lost_the_oftener_is_asked_within_the_shortest_time(n, low, high):
    low, high = sorted((low, high))
    times = CONFIG.times_asked(n, high)
    assert MIN_ASKED <= CONFIG.times_asked(n, low) <= times <= MAX_ASKED
    gap = CONFIG.shortest_suspicion(n) / (times + 1)
    assert gap >= CONFIG.probe_seconds
    assert times == MAX_ASKED or high**times <= MISSED * 1.001


def test_a_call_is_lost_only_if_its_peer_lives():
    losses = Losses()
    ghost, lossy = PEERS[0], PEERS[1]
    for _ in range(200):
        losses.unanswered(ghost)
    losses.forget(ghost)
    losses.heard(ghost)
    assert losses.share == 0
    for turn in range(200):  # every other call is lost
        losses.unanswered(lossy) if turn % 2 else losses.answered()
        losses.heard(lossy)
        assert 0 <= losses.share < 1
    assert losses.share == pytest.approx(0.5, abs=0.05)
    for _ in range(200):
        losses.answered()
    assert losses.share < 0.001


def test_a_claim_of_life_is_signed_for_one_mesh_and_incarnation():
    signer = Ed25519Signer(bytes(32))
    mesh = MeshId("aa")
    seal = sign_alive(signer, mesh, 5)
    assert check_alive(mesh, signer.peer_id, 5, seal)
    assert not check_alive(mesh, signer.peer_id, 6, seal)
    assert not check_alive(MeshId("ab"), signer.peer_id, 5, seal)
    assert not check_alive(mesh, Ed25519Signer(bytes([1]) * 32).peer_id, 5, seal)


@given(
    st.binary(max_size=300)
    | pings.map(CODEC.encode).flatmap(
        lambda raw: st.integers(0, len(raw)).map(
            lambda at: raw[:at] + b"\xc1" + raw[at:]
        )
    )
)
def test_the_door_takes_any_bytes(data):
    try:
        message = decode_untrusted(data)
    except RemoteProtocolError:
        return
    assert isinstance(message, Ping | Ack)


@given(pings | acks)
def test_messages_come_back_as_they_were(message):
    assert decode_untrusted(CODEC.encode(message)) == message
