"""Spares: any order of events keeps the bounds, and an idle peer ends with none."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nat.punch.config import PunchConfig
from nat.punch.spares import DOUBT_SECONDS, Spares

CONFIG = PunchConfig(bulk_sockets=2, max_spares=5, spare_idle_seconds=60.0)
PEERS = st.sampled_from(["a", "b", "c", "d"])


class SpareMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.spares = Spares(CONFIG)
        self.now = 0.0
        self.open = {}  # number: (peer, since)
        self.coming = []
        self.doubted = {}

    @rule(peer=PEERS)
    def use(self, peer):
        self.spares.used(peer, self.now)

    @rule(seconds=st.floats(0.1, 40))
    def wait(self, seconds):
        self.now += seconds
        for number in self.spares.expire(self.now):
            _, since = self.open.pop(number)
            assert self.now - since >= CONFIG.spare_idle_seconds

    @rule()
    def punch(self):
        wanted = self.spares.wanted(self.now)
        if wanted:  # abandoned punches may have taken the room of those under way
            planned = len(wanted) + len(self.coming) + len(self.open)
            assert planned <= CONFIG.max_spares
        for peer in wanted:
            self.spares.started(peer)
            self.coming.append(peer)

    @rule(works=st.booleans())
    def finish(self, works):
        if not self.coming:
            return
        peer = self.coming.pop(0)
        if works:
            self.keep(peer)
        self.spares.ended(peer)

    @rule(peer=PEERS)
    def abandoned(self, peer):
        self.spares.used(peer, self.now)
        self.keep(peer)

    def keep(self, peer):
        number = self.spares.add(peer, self.now)
        if number is not None:
            assert number not in self.open
            self.open[number] = (peer, self.now)

    @rule(peer=PEERS)
    def take(self, peer):
        number = self.spares.take(peer, self.now)
        mine = {n: since for n, (owner, since) in self.open.items() if owner == peer}
        at = self.doubted.get(peer, -1.0)
        if mine and mine[max(mine)] <= at and self.now < at + DOUBT_SECONDS:
            assert number is None, "nobody knows yet whether it is dead"
            return
        assert (number is None) == (not mine)
        if number is not None:
            assert number == max(mine)
            del self.open[number]

    @rule(peer=PEERS)
    def doubt(self, peer):
        mine = [n for n, (owner, _) in self.open.items() if owner == peer]
        assert sorted(self.spares.doubt(peer, self.now)) == sorted(mine)
        if mine:
            self.doubted[peer] = self.now
        self.now += 0.001  # what comes from now on is beyond doubt

    @rule(data=st.data())
    def die(self, data):
        if self.open:
            number = data.draw(st.sampled_from(sorted(self.open)))
            self.spares.drop(number)
            del self.open[number]

    @rule(peer=PEERS)
    def forget(self, peer):
        gone = self.spares.forget(peer)
        assert all(self.open.pop(number)[0] == peer for number in gone)
        self.coming = [p for p in self.coming if p != peer]

    @invariant()
    def bounds(self):
        assert len(self.spares) == len(self.open) <= CONFIG.max_spares
        for peer in "abcd":
            mine = [n for n, (owner, _) in self.open.items() if owner == peer]
            assert self.spares.ready(peer) == len(mine) <= CONFIG.bulk_sockets

    def teardown(self):
        for peer in self.coming:
            self.spares.ended(peer)
        self.now += CONFIG.spare_idle_seconds + 1
        for number in self.spares.expire(self.now):
            del self.open[number]
        assert not self.open
        assert self.spares.wanted(self.now) == []


TestSpares = pytest.mark.slow(SpareMachine.TestCase)
TestSpares.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_peer_in_use_gets_its_spares_and_a_direct_one_none():
    spares = Spares(CONFIG)
    assert spares.take("a", 0.0) is None
    assert (
        spares.wanted(0.0) == []
    )  # nothing was punched for it: plain dials lead there
    spares.used("a", 0.0)
    assert spares.wanted(0.0) == ["a", "a"]
    assert spares.wanted(60.0) == []


def test_the_latest_used_peer_goes_first_when_room_is_short():
    spares = Spares(CONFIG)
    for at, peer in enumerate("abc"):
        spares.used(peer, float(at))
    assert spares.wanted(3.0) == ["c", "c", "b", "b", "a"]
