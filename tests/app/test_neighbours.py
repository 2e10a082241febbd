"""The graph of standing connections: whole, bounded, stable, alike from both ends."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.app.neighbours import BOUND_FACTOR, Neighbours, Rings
from fabric.core.ids import PeerId


def names(count, salt=0):
    return [PeerId(f"peer-{salt}-{number}") for number in range(count)]


def graph(peers, limit, absent=frozenset()):
    """Return whom each living peer chooses when all agree on who is there."""
    rings = Rings(limit // 2)
    rings.set_peers(set(peers))
    one = Neighbours(peers[0], limit)
    one.set_members(peers)
    alive = set(peers) - absent
    if len(alive) - 1 <= limit:
        return {peer: alive - {peer} for peer in alive}
    chosen = {peer: rings.around(peer, absent) for peer in alive}
    assert peers[0] in absent or chosen[peers[0]] == one.chosen(absent)
    return chosen


def reached(chosen, alive=None):
    """Return who is reached from one peer over the living."""
    alive = set(chosen) if alive is None else alive
    frontier = [min(alive)]
    seen = set(frontier)
    while frontier:
        for peer in chosen[frontier.pop()] & alive - seen:
            seen.add(peer)
            frontier.append(peer)
    return seen


@given(st.integers(1, 300), st.sampled_from([4, 6, 16, 48]), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_the_graph_is_whole_bounded_and_mutual(count, limit, salt):
    chosen = graph(names(count, salt), limit)
    assert reached(chosen) == set(chosen)
    for peer, neighbours in chosen.items():
        assert peer not in neighbours
        assert len(neighbours) <= limit
        assert len(neighbours) == count - 1 or count - 1 > limit
        assert all(peer in chosen[other] for other in neighbours)


@given(st.integers(60, 300), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_without_a_third_of_it_the_graph_is_still_whole(count, seed):
    """Before anybody has noticed: the old choices among those who are left."""
    peers = names(count)
    gone = set(random.Random(seed).sample(peers, count * 3 // 10))
    alive = set(peers) - gone
    assert reached(graph(peers, 48), alive) == alive


@given(st.integers(8, 200), st.sampled_from([4, 48]), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_when_the_dead_are_known_their_places_are_taken(count, limit, seed):
    peers = names(count)
    gone = frozenset(random.Random(seed).sample(peers, count * 3 // 10))
    chosen = graph(peers, limit, gone)
    assert reached(chosen) == set(chosen)
    assert all(len(each) <= limit and not each & gone for each in chosen.values())


@given(st.integers(60, 250), st.sampled_from([4, 12, 48]), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_one_who_joins_changes_little(count, limit, salt):
    peers = names(count, salt)
    before = graph(peers[:-1], limit)
    after = graph(peers, limit)
    joined = peers[-1]
    lost = 0
    for peer, neighbours in before.items():
        assert after[peer] - neighbours <= {joined}
        lost += len(neighbours - after[peer])
    assert lost <= limit  # two ends of at most one connection per ring


@given(st.integers(60, 200), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_who_alone_fails_to_reach_somebody_finds_others(count, seed):
    peers = names(count)
    core = Neighbours(peers[0], 16)
    core.set_members(peers)
    usual = core.chosen()
    failing = frozenset(random.Random(seed).sample(sorted(usual), len(usual) // 2))
    found = core.chosen(unreached=failing)
    assert usual <= found  # they are tried again
    assert len(found - failing) >= len(usual) - len(failing)
    assert len(found) <= 32
    # however many fail, somebody is left to try until nobody is
    everybody = frozenset(peers[1:])
    tried = frozenset()
    while not tried >= everybody:
        more = core.chosen(unreached=tried)
        assert more - tried
        tried |= more


def test_members_come_and_go_as_if_they_had_been_there_from_the_start():
    peers = names(80)
    one = Neighbours(peers[0], 8)
    one.set_members(peers[:30])
    one.set_members(peers[10:])
    one.set_members(peers[5:60])
    other = Neighbours(peers[0], 8)
    other.set_members(peers[5:60])
    assert one.chosen() == other.chosen()


def idle_core(limit=4, count=30):
    peers = names(count)
    core = Neighbours(peers[0], limit)
    core.set_members(peers)
    return core, [peer for peer in peers[1:] if peer not in core.chosen()]


def test_only_idle_surplus_is_closed_the_longest_idle_first():
    core, others = idle_core()
    idle = dict.fromkeys(core.chosen(), 1000.0)
    idle |= {others[0]: 70.0, others[1]: 0.0, others[2]: 90.0, others[3]: 10.0}
    found = core.surplus(idle, core.chosen(), 60.0)
    assert found == [others[2], others[0]]
    assert core.surplus(dict(list(idle.items())[:4]), core.chosen(), 60.0) == []


def test_above_the_bound_nobody_waits_for_long():
    core, others = idle_core()
    idle = dict.fromkeys(others[: BOUND_FACTOR * 4 + 3], 6.0)
    idle[others[0]] = 0.0
    assert core.is_crowded(len(idle))
    assert len(core.surplus(idle, core.chosen(), 60.0)) == len(idle) - 4
    assert others[0] not in core.surplus(idle, core.chosen(), 60.0)


@pytest.mark.parametrize("limit", [4, 48])
def test_a_small_mesh_closes_nothing(limit):
    peers = names(limit + 1)
    core = Neighbours(peers[0], limit)
    core.set_members(peers)
    assert not core.bounded
    assert core.chosen() == frozenset(peers[1:])
    assert core.surplus(dict.fromkeys(peers[1:], 9e9), frozenset(), 60.0) == []
