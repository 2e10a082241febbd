"""When to reconcile and with whom: against the rules, under any order of events."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from crdt_store.config import StoreConfig
from crdt_store.schedule import ECHOES, MAX_RUNNING, SyncSchedule
from fabric.core.ids import PeerId

PEERS = [PeerId(f"p{n}") for n in range(8)]
SUBSETS = st.sets(st.sampled_from(PEERS))


def schedule(seed: int = 1, members: int = 3) -> SyncSchedule:
    return SyncSchedule(StoreConfig(), random.Random(seed), 100.0, members)


def test_the_period_is_five_seconds_and_grows_with_the_mesh() -> None:
    periods = [schedule().period(n) for n in (1, 166, 200, 5000)]
    assert periods == [5.0, 5.0, 6.0, 150.0]


def test_a_fresh_connection_comes_first_and_one_that_returns_is_fresh() -> None:
    chosen = schedule()
    assert chosen.due(100.0, {PEERS[0]}, 3) == [PEERS[0]]
    chosen.ended(PEERS[0])
    assert chosen.due(101.0, {PEERS[0]}, 3) == []
    assert chosen.due(102.0, set(), 3) == []
    assert chosen.due(103.0, {PEERS[0]}, 3) == [PEERS[0]]


def test_news_from_a_fresh_connection_go_on_to_a_few_others_once() -> None:
    chosen, near, far = schedule(), set(PEERS[:7]), PEERS[7]
    while fresh := chosen.due(100.0, near, 8):
        for peer in fresh:
            chosen.ended(peer)
    assert chosen.due(101.0, near | {far}, 8) == [far]
    chosen.ended(far, news=True)
    told = chosen.due(101.0, near | {far}, 8)
    assert len(set(told)) == ECHOES
    assert far not in told
    for peer in told:
        chosen.ended(peer, news=True)  # they have something, too; rounds will do
    assert chosen.due(102.0, near | {far}, 8) == []


def test_no_news_are_no_reason_to_tell_anybody() -> None:
    chosen = schedule()
    assert len(chosen.due(100.0, set(PEERS[:2]), 3)) == 2
    for peer in PEERS[:2]:
        chosen.ended(peer, news=False)
    assert chosen.due(101.0, set(PEERS[:2]), 3) == []


def test_one_random_partner_per_period_reaches_everybody() -> None:
    chosen, everybody = schedule(), set(PEERS)
    partners: list[PeerId] = []
    starts: list[float] = []
    for step in range(6000):
        now = 100.0 + step
        for peer in chosen.due(now, everybody, 3):
            chosen.ended(peer)
            partners.append(peer)
            starts.append(now)
    assert set(partners) == everybody
    rounds = starts[len(PEERS) :]
    assert {b - a for a, b in itertools.pairwise(rounds)} == {5.0}


def test_peers_started_together_do_not_stay_together() -> None:
    firsts = {schedule(seed).next_round for seed in range(20)}
    assert len(firsts) == 20
    assert all(105.0 <= first < 110.0 for first in firsts)


class Schedules(RuleBasedStateMachine):
    """Connections come and go, sessions end or hang, calls come at any time."""

    @initialize(seed=st.integers(0, 9))
    def start(self, seed) -> None:
        self.schedule = schedule(seed)
        self.now = 100.0
        self.running: set[PeerId] = set()
        self.fresh: set[PeerId] = set()
        self.connected: set[PeerId] = set()
        self.looked_at: set[PeerId] = set()

    @rule(connected=SUBSETS)
    def connect(self, connected) -> None:
        self.connected = connected

    @rule(seconds=st.floats(0, 20))
    def look(self, seconds) -> None:
        self.now += seconds
        self.fresh &= self.connected
        self.fresh |= self.connected - self.looked_at
        self.looked_at = self.connected
        chosen = self.schedule.due(self.now, self.connected, 3)
        assert set(chosen) <= self.connected
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & self.running
        self.running |= set(chosen)
        self.fresh -= self.running
        if len(self.running) < MAX_RUNNING:
            assert not self.fresh

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data) -> None:
        peer = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(peer)
        self.schedule.ended(peer, news=data.draw(st.booleans()))

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "running"):
            assert len(self.running) <= MAX_RUNNING
            assert self.schedule.next_round > self.now - 25


TestSchedules = Schedules.TestCase
