"""Whom a search in Kademlia's key space asks; a liar cannot make it endless."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID

from fabric.core.ids import peer_id_of
from fabric.net.lookup import MAX_KNOWN_PEERS, Walk, position, target_of

PEERS = [peer_id_of(hashlib.sha256(bytes([n, n])).digest()) for n in range(120)]
KEY = bytes(range(32))


def nearest(key: bytes, peers, count: int):
    return sorted(peers, key=lambda p: position(p) ^ target_of(key))[:count]


def test_positions_are_those_of_py_libp2p():
    for peer in PEERS[:5]:
        raw = ID.from_base58(peer).to_bytes()
        assert position(peer) == int.from_bytes(hashlib.sha256(raw).digest(), "big")


@pytest.mark.slow
@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32), st.integers(1, 10))
def test_a_walk_over_a_connected_graph_finds_the_nearest(key, seed, parallel):
    rng = random.Random(seed)
    tables = {peer: [p for p in PEERS if p != peer] for peer in PEERS}
    walk = Walk(key, PEERS[0])
    for peer in rng.sample(PEERS[1:], 3):
        walk.learn(peer, ())
    num_asked = 0
    while batch := walk.next_batch(20, parallel):
        assert not walk.asked & set(batch)
        num_asked += len(batch)
        for peer in batch:
            walk.asked.add(peer)
            walk.hear(peer, ())
            for other in nearest(key, tables[peer], 20):
                walk.learn(other, ())
    found = walk.nearest(walk.answered, 20)
    assert found == nearest(key, PEERS[1:], 20)
    assert num_asked <= 3 + 20 + parallel


@given(st.sets(st.integers(1, 119), max_size=60))
def test_who_is_silent_makes_room_for_the_next(silent):
    dead = {PEERS[n] for n in silent}
    walk = Walk(KEY, PEERS[0])
    for peer in PEERS:
        walk.learn(peer, ("/ip4/10.0.0.1/tcp/1",))
    while batch := walk.next_batch(20, 7):
        for peer in batch:
            walk.asked.add(peer)
            if peer not in dead:
                walk.hear(peer, ())
    alive = [p for p in PEERS[1:] if p not in dead]
    assert walk.nearest(walk.answered, 20) == nearest(KEY, alive, 20)


def test_a_liar_cannot_name_endless_peers_nor_us():
    walk = Walk(KEY, PEERS[0])
    walk.learn(PEERS[0], ())
    assert not walk.known
    for n in range(MAX_KNOWN_PEERS + 50):
        walk.learn(peer_id_of(n.to_bytes(32, "big")), ())
    assert len(walk.known) == MAX_KNOWN_PEERS


def test_it_ends_when_more_than_enough_are_named():
    walk = Walk(KEY, PEERS[0])
    walk.hear(PEERS[1], PEERS[2:4])
    assert not walk.has_found(None)
    assert not walk.has_found(2), "one of them may be ourselves"
    assert walk.has_found(1)
    assert list(walk.providers) == PEERS[2:4]
