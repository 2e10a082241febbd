"""The swarm core: any order of answers, failures and silence; it ends, bounded."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from dht import bitmap
from dht.swarm import MAX_BAD_BLOCKS, Swarm
from fabric.core.errors import LocalProtocolError
from fabric.core.ids import PeerId

HONEST = PeerId("honest")
OTHERS = [PeerId(f"p{n}") for n in range(4)]


class SwarmMachine(RuleBasedStateMachine):
    """One honest peer holds everything; the others do what they like."""

    @initialize(
        num_blocks=st.integers(0, 40), seed=st.integers(0, 99), window=st.integers(1, 5)
    )
    def start(self, num_blocks, seed, window):
        self.n, self.now, self.asked = num_blocks, 0.0, {}
        self.swarm = Swarm(
            num_blocks, rng=random.Random(seed), window=window, timeout=5.0
        )
        self.swarm.add_peer(HONEST, bitmap.full(num_blocks))
        self.window = window

    @rule(peer=st.sampled_from(OTHERS), data=st.data())
    def join(self, peer, data):
        have = data.draw(st.integers(0, bitmap.full(self.n)))
        if peer not in self.swarm.peers and not self.swarm.is_banned(peer):
            self.swarm.add_peer(peer, have)

    @rule(peer=st.sampled_from(OTHERS), data=st.data())
    def learn(self, peer, data):
        if peer in self.swarm.peers:
            have = data.draw(st.integers(0, bitmap.full(self.n)))
            self.swarm.update_have(peer, have)

    @rule(peer=st.sampled_from(OTHERS))
    def leave(self, peer):
        self.swarm.remove_peer(peer)
        self.asked.pop(peer, None)

    @rule(peer=st.sampled_from([HONEST, *OTHERS]))
    def ask(self, peer):
        if peer not in self.swarm.peers:
            return
        blocks = self.swarm.next_blocks(peer, self.now)
        mine = self.asked.setdefault(peer, [])
        assert not set(blocks) & set(mine), "a peer is asked for a block once at a time"
        assert not any(self.swarm._held >> b & 1 for b in blocks)
        mine += blocks

    def answer(self, peer, data):
        block = data.draw(st.sampled_from(self.asked[peer]))
        self.asked[peer].remove(block)
        return block

    waiting = precondition(lambda self: any(getattr(self, "asked", {}).values()))

    def someone(self, data, among):
        busy = [p for p in among if self.asked.get(p)]
        return data.draw(st.sampled_from(busy)) if busy else None

    @waiting
    @rule(data=st.data())
    def good(self, data):
        peer = self.someone(data, [HONEST, *OTHERS])
        block = self.answer(peer, data)
        held = self.swarm._held >> block & 1
        assert self.swarm.on_block(peer, block, self.now) == (not held)
        assert self.swarm._held >> block & 1

    @waiting
    @rule(data=st.data())
    def bad(self, data):
        peer = self.someone(data, OTHERS)
        if peer is not None:
            block = self.answer(peer, data)
            if self.swarm.on_bad_block(peer, block, self.now):
                self.asked.pop(peer)
                assert peer not in self.swarm.peers
                with pytest.raises(LocalProtocolError):
                    self.swarm.add_peer(peer, 0)

    @waiting
    @rule(data=st.data())
    def missing(self, data):
        peer = self.someone(data, OTHERS)
        if peer is not None:
            self.swarm.on_missing(peer, self.answer(peer, data), self.now)

    @rule(seconds=st.floats(0.1, 8))
    def wait(self, seconds):
        self.now += seconds
        for peer in self.swarm.on_timeout(self.now):
            assert self.asked[peer]
            assert self.swarm.next_blocks(peer, self.now) == []

    @invariant()
    def consistent(self):
        if hasattr(self, "swarm"):
            self.swarm.check_integrity()
            late = self.swarm.next_timeout()
            assert late is None or late > 0

    def teardown(self):
        # liveness: the honest peer stays, the others never answer again
        if not hasattr(self, "swarm"):
            return
        mine = self.asked.get(HONEST, [])
        for _ in range(20 * self.n + 20):
            if self.swarm.done:
                return
            mine += self.swarm.next_blocks(HONEST, self.now)
            if mine:
                self.swarm.on_block(HONEST, mine.pop(0), self.now)
            else:
                late = self.swarm.next_timeout()
                assert late is not None, "nothing to wait for and not done"
                self.now = late
                assert self.swarm.on_timeout(self.now)
        raise AssertionError("the download does not end")


TestSwarm = SwarmMachine.TestCase
TestSwarm.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def make(n, **options):
    return Swarm(n, rng=random.Random(3), **options)


def test_window_and_rarest_first():
    swarm = make(50, held=bitmap.full(10), window=100)
    a, b = OTHERS[:2]
    swarm.add_peer(a, bitmap.full(50) & ~(1 << 17))  # partial holder of all but 17
    swarm.add_peer(HONEST, bitmap.full(50))
    order = swarm.next_blocks(HONEST, 0.0)
    assert order[0] == 17, "the block no partial holder has comes first"
    assert sorted(order) == list(range(10, 50))
    assert b not in swarm.peers


def test_first_blocks_are_random():
    firsts = set()
    for seed in range(20):
        swarm = Swarm(1000, rng=random.Random(seed), window=1)
        swarm.add_peer(HONEST, bitmap.full(1000))
        firsts.update(swarm.next_blocks(HONEST, 0.0))
    assert len(firsts) > 15


def test_a_peer_with_one_needle_is_asked_for_it():
    swarm = make(5000, held=0b1111)
    swarm.add_peer(HONEST, 1 << 4321)
    assert swarm.next_blocks(HONEST, 0.0) == [4321]
    assert swarm.next_blocks(HONEST, 0.0) == []


def test_endgame_repeats_the_oldest_request_at_most_twice():
    swarm = make(3, window=4)
    for peer in OTHERS:
        swarm.add_peer(peer, bitmap.full(3))
    first = swarm.next_blocks(OTHERS[0], 0.0)
    assert sorted(first) == [0, 1, 2]
    again = swarm.next_blocks(OTHERS[1], 1.0)
    assert sorted(again) == [0, 1, 2]
    assert swarm.next_blocks(OTHERS[2], 2.0) == [], "two copies are enough"
    for block in again:
        assert swarm.on_block(OTHERS[1], block, 3.0)
    assert swarm.done
    assert not swarm.on_block(OTHERS[0], first[0], 9.0), "a late copy is not new"


def test_a_silent_peer_loses_its_blocks_and_its_late_answers_count():
    swarm = make(4, window=4, timeout=5.0)
    slow, fast = OTHERS[:2]
    swarm.add_peer(slow, 0b1111)
    asked = swarm.next_blocks(slow, 0.0)
    assert swarm.next_timeout() == 5.0
    assert swarm.on_timeout(4.9) == []
    assert swarm.on_timeout(5.0) == [slow]
    assert swarm.next_timeout() is None
    swarm.add_peer(fast, 0b1111)
    assert sorted(swarm.next_blocks(fast, 6.0)) == [0, 1, 2, 3]
    assert swarm.on_block(slow, asked[0], 7.0)
    assert swarm.num_held == 1
    swarm.check_integrity()
    swarm.remove_peer(fast)
    assert swarm.next_blocks(slow, 8.0) == [], "it still owes all that is left"
    swarm.on_missing(slow, asked[1], 8.0)
    swarm.update_have(slow, 0b1111)
    assert swarm.next_blocks(slow, 9.0) == [asked[1]], "who answers is asked again"


def test_losing_one_of_two_copies_allows_one_more_and_not_two():
    swarm = make(3, window=4)
    for peer in OTHERS:
        swarm.add_peer(peer, bitmap.full(3))
    for peer in OTHERS[:2]:
        assert len(swarm.next_blocks(peer, 0.0)) == 3
    swarm.remove_peer(OTHERS[0])
    assert len(swarm.next_blocks(OTHERS[2], 1.0)) == 3
    assert swarm.next_blocks(OTHERS[3], 1.0) == []


def test_two_bad_blocks_ban_for_good():
    swarm = make(10)
    bad = OTHERS[0]
    swarm.add_peer(bad, bitmap.full(10))
    blocks = swarm.next_blocks(bad, 0.0)
    assert not swarm.on_bad_block(bad, blocks[0], 1.0)
    swarm.remove_peer(bad)
    swarm.add_peer(bad, bitmap.full(10))  # reconnecting does not wash it clean
    blocks = swarm.next_blocks(bad, 2.0)
    assert swarm.on_bad_block(bad, blocks[0], 3.0)
    assert MAX_BAD_BLOCKS == 2
    swarm.check_integrity()


def test_a_large_download_is_cheap_to_decide():
    swarm = make(20_000)
    swarm.add_peer(HONEST, bitmap.full(20_000))
    done = 0
    while not swarm.done:
        for block in swarm.next_blocks(HONEST, 0.0)[:2000]:
            swarm.on_block(HONEST, block, 0.0)
            done += 1
        if done > 500:
            break
    assert done > 500
