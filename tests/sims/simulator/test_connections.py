"""Who is connected with whom in a run: the daemon's own choice, kept up to date."""

from __future__ import annotations

import random

import pytest

from fabric.app.neighbours import Neighbours
from sims.engine.randomness import key
from sims.peers.connections import Connections

PEERS = [key(1, f"peer-{n}").peer_id for n in range(120)]


def test_up_to_the_bound_everybody_is_connected_with_everybody():
    connections = Connections(48)
    connections.set_sides({0: frozenset(PEERS[:49])})
    assert connections.of(PEERS[0], 0) == frozenset(PEERS[1:49])
    connections.set_sides({0: frozenset(PEERS[:50])})
    assert 24 <= len(connections.of(PEERS[0], 0)) <= 48
    assert connections.of(PEERS[60], 0) == frozenset(), "it is not up"


@pytest.mark.parametrize("most", [0, 8, 48])
def test_after_any_history_all_stand_where_they_would_stand_afresh(most):
    rng, connections = random.Random(most), Connections(most)
    for _ in range(40):
        up = rng.sample(PEERS, rng.choice((100, 101, 102, 30)))
        halves = {0: frozenset(up[:60]), 1: frozenset(up[60:])}
        sides = halves if rng.random() < 0.3 else {0: frozenset(up)}
        connections.set_sides(sides)
        fresh = Connections(most)
        fresh.set_sides(sides)
        for side, peers in sides.items():
            for peer in peers:
                assert connections.of(peer, side) == fresh.of(peer, side)


def test_a_connection_is_chosen_by_both_ends_as_each_daemon_would():
    connections = Connections(8)
    up = frozenset(PEERS)
    connections.set_sides({0: up})
    for peer in PEERS:
        alone = Neighbours(peer, 8)
        alone.set_members(up)
        assert connections.of(peer, 0) == alone.chosen()
        assert all(peer in connections.of(other, 0) for other in alone.chosen())


def test_who_leaves_is_noticed_by_its_neighbours_alone():
    connections = Connections(8)
    connections.set_sides({0: frozenset(PEERS)})
    connections.take_changed()
    before = connections.of(PEERS[7], 0)
    connections.set_sides({0: frozenset(PEERS) - {PEERS[7]}})
    changed = connections.take_changed()
    assert changed == before | {PEERS[7]}
    assert connections.take_changed() == set()
