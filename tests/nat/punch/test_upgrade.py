"""Upgrades: bounded, backed off, and every relayed peer gets its turn."""

import math

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fabric.core.errors import NoRoute
from nat.punch.config import PunchConfig
from nat.punch.facts import IMPOSSIBLE
from nat.punch.upgrade import UpgradeCore
from nat.punch.upgrade_service import UpgradeService

STEPS = (5.0, 30.0, 300.0)
PEERS = [f"p{n}" for n in range(6)]


class UpgradeMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.core = UpgradeCore(STEPS, max_running=2)
        self.now = 0.0
        self.relayed = frozenset()
        self.running = set()
        self.impossible = set()
        self.failed_at = {}

    @rule(peers=st.frozensets(st.sampled_from(PEERS)))
    def update(self, peers):
        self.relayed = peers
        self.core.update(peers)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def start(self):
        for peer in self.core.start(self.now):
            assert peer in self.relayed
            assert peer not in self.running
            assert peer not in self.impossible
            assert self.now - self.failed_at.get(peer, -math.inf) >= STEPS[0]
            self.running.add(peer)

    @rule(data=st.data(), how=st.sampled_from(["works", "later", "never"]))
    def end(self, data, how):
        if not self.running:
            return
        peer = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(peer)
        failure = "" if how == "works" else "why"
        self.core.ended(peer, self.now, failure=failure, may_pass=how == "later")
        self.failed_at.pop(peer, None)
        self.impossible.discard(peer)
        if how == "works":
            self.relayed -= {peer}
        if how == "later":
            self.failed_at[peer] = self.now
        if how == "never":
            self.impossible.add(peer)

    @rule()
    def network(self):
        self.core.network_changed()
        self.impossible.clear()
        self.failed_at.clear()

    @invariant()
    def bounded(self):
        assert len(self.running) <= 2

    def teardown(self):
        """After the last change everyone possible is upgraded within one long wait."""
        for peer in sorted(self.running):
            self.core.ended(peer, self.now)
            self.relayed -= {peer}
        self.core.network_changed()
        left = set(self.relayed)
        while left:
            assert self.core.next_at() <= self.now
            started = self.core.start(self.now)
            assert started
            for peer in started:
                self.core.ended(peer, self.now)
                left.discard(peer)
        assert self.core.next_at() == math.inf


TestUpgrade = pytest.mark.slow(UpgradeMachine.TestCase)
TestUpgrade.settings = settings(max_examples=60, stateful_step_count=30)


def test_at_once_then_after_growing_waits():
    core = UpgradeCore(STEPS)
    core.update(frozenset({"a"}))
    now, starts = 0.0, []
    for _ in range(4):
        now = max(now, core.next_at())
        assert core.start(now) == ["a"]
        starts.append(now)
        core.ended("a", now, failure="closed")
    assert starts == [0.0, 5.0, 35.0, 335.0]
    assert core.reason("a") == "closed"


async def test_the_service_tries_again_and_leaves_the_impossible(autojump_clock):
    relayed, calls = {"soon", "never"}, []

    async def upgrade(peer):
        calls.append((peer, trio.current_time()))
        if peer == "never":
            raise NoRoute("symmetric", code=IMPOSSIBLE)
        if sum(p == "soon" for p, _ in calls) < 3:
            raise NoRoute("not yet", code="E_PUNCH_FAILED")
        relayed.discard("soon")

    service = UpgradeService(PunchConfig(), lambda: relayed, upgrade)
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        await nursery.start(service.run)
        with trio.move_on_after(2000):
            await trio.Event().wait()
        assert service.reason("never") == "symmetric"
        assert sum(p == "never" for p, _ in calls) == 1
        service.network_changed()
        with trio.move_on_after(2):
            await trio.Event().wait()
        nursery.cancel_scope.cancel()
    assert sum(p == "never" for p, _ in calls) == 2
    soon = [at - began for p, at in calls if p == "soon"]
    first, second, *_ = PunchConfig().retry_seconds
    assert soon == pytest.approx([0, first, first + second], abs=2)
