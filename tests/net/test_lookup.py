"""Whom a search in Kademlia's key space asks; a liar cannot make it endless."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID

from fabric.core.ids import peer_id_of
from fabric.net.lookup import (
    MAX_KNOWN_PEERS,
    PATIENCE_SECONDS,
    Walk,
    position,
    target_of,
)

PEERS = [peer_id_of(hashlib.sha256(bytes([n, n])).digest()) for n in range(120)]
KEY = bytes(range(32))


def nearest(key: bytes, peers, count: int):
    return sorted(peers, key=lambda p: position(p) ^ target_of(key))[:count]


def test_positions_are_those_of_py_libp2p():
    for peer in PEERS[:5]:
        raw = ID.from_base58(peer).to_bytes()
        assert position(peer) == int.from_bytes(hashlib.sha256(raw).digest(), "big")


def walk_for(key: bytes = KEY, parallel: int = 10, enough: int | None = None) -> Walk:
    return Walk(key, PEERS[0], replicas=20, parallel=parallel, enough=enough)


@pytest.mark.slow
@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32), st.integers(1, 10))
def test_a_walk_over_a_connected_graph_finds_the_nearest(key, seed, parallel):
    rng, best = random.Random(seed), nearest(key, PEERS[1:], 20)
    walk = walk_for(key, parallel)
    for peer in rng.sample(PEERS[1:], 3):
        walk.learn(peer, ())
    pending, asked = [], []
    while not walk.is_over(0.0):
        taken = walk.take(0.0)
        assert not set(asked) & set(taken), "nobody is asked twice"
        asked += taken
        pending += taken
        assert len(pending) <= parallel
        peer = pending.pop(rng.randrange(len(pending)))  # answers in any order
        for other in best:
            walk.learn(other, ())
        walk.hear(peer, ())
    assert walk.nearest(walk.answered, 20) == best
    assert len(asked) <= 3 + 20 + parallel


@pytest.mark.slow
@given(st.sets(st.integers(1, 119), max_size=60))
def test_who_refuses_makes_room_for_the_next(refusing):
    gone = {PEERS[n] for n in refusing}
    walk = walk_for()
    for peer in PEERS:
        walk.learn(peer, ("/ip4/10.0.0.1/tcp/1",))
    while not walk.is_over(0.0):
        for peer in walk.take(0.0):
            walk.miss(peer) if peer in gone else walk.hear(peer, ())
    alive = [p for p in PEERS[1:] if p not in gone]
    assert walk.nearest(walk.answered, 20) == nearest(KEY, alive, 20)


def test_who_is_silent_is_passed_over_and_may_still_answer():
    walk = walk_for(parallel=3)
    for peer in PEERS[:30]:
        walk.learn(peer, ())
    silent = walk.take(0.0)
    assert len(silent) == 3
    assert walk.take(1.0) == []
    assert walk.next_timeout(1.0) == PATIENCE_SECONDS
    assert not walk.is_over(1.0)
    now = PATIENCE_SECONDS
    while taken := walk.take(now):
        for peer in taken:
            walk.hear(peer, ())
    assert walk.is_over(now)
    assert len(walk.answered) == 20, "three more took their places"
    walk.hear(silent[0], [PEERS[5]])
    assert list(walk.providers) == [PEERS[5]]


def test_a_liar_cannot_name_endless_peers_nor_us():
    walk = walk_for()
    walk.learn(PEERS[0], ())
    assert not walk.known
    assert walk.is_over(0.0)
    for n in range(MAX_KNOWN_PEERS + 50):
        walk.learn(peer_id_of(n.to_bytes(32, "big")), ())
    assert len(walk.known) == MAX_KNOWN_PEERS


def test_it_ends_when_more_than_enough_are_named():
    for enough, over in ((None, False), (2, False), (1, True)):
        walk = walk_for(enough=enough)
        for peer in PEERS[1:9]:
            walk.learn(peer, ())
        first = walk.take(0.0)[0]
        walk.hear(first, PEERS[2:4])
        assert walk.is_over(0.0) is over, "one of them may be ourselves"
    assert walk.take(0.0) == []
    assert list(walk.providers) == PEERS[2:4]
