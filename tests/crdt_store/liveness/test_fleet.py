"""Whole fleets in virtual time: ghosts vanish within the bound, the slow stay."""

import os

import pytest

from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.core import State
from tests.crdt_store.liveness.fleet import Fleet, name

CONFIG = LivenessConfig()
FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
LOSSY_SEEDS = [range(first, first + 20) for first in range(0, 20 * FACTOR, 20)]
"""In 8 of the first 20, somebody alive was dead when each was called only once."""
LARGE = [200] if FACTOR == 1 else [200, 500, 1000]
ALIVE, DEAD = {State.ALIVE}, {State.DEAD}


def settled(count, seed=0):
    fleet = Fleet(count, seed=seed)
    fleet.run_until(lambda: all(fleet.views(peer) == ALIVE for peer in fleet.cores), 60)
    return fleet


def test_everybody_is_alive_soon_and_stays_so():
    fleet = settled(8)
    for _ in range(200):
        fleet.run(5)
        assert all(fleet.views(peer) == ALIVE for peer in fleet.cores)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 20])
@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_ghost_is_dead_everywhere_within_the_bound(count, noticed, seed):
    fleet = settled(count, seed)
    fleet.run(fleet.rng.uniform(0, 20))
    ghost = name(count - 1)
    fleet.kill(ghost, noticed=noticed)
    fleet.run_until(
        lambda: fleet.views(ghost) == DEAD, CONFIG.ghost_bound_seconds(count)
    )
    others = fleet.alive()
    assert all(fleet.views(peer) <= ALIVE for peer in others)


@pytest.mark.slow
@pytest.mark.parametrize("count", LARGE)
@pytest.mark.parametrize("seed", range(2))
def test_ghosts_among_hundreds(count, seed):
    fleet = settled(count, seed)
    ghosts = [name(3), name(99)]
    for ghost in ghosts:
        fleet.kill(ghost, noticed=False)
    took = fleet.run_until(
        lambda: all(fleet.views(ghost) == DEAD for ghost in ghosts),
        CONFIG.ghost_bound_seconds(count),
    )
    print(f"dead in {count - 2} views after {took:.0f} s")
    assert all(fleet.views(peer) == ALIVE for peer in fleet.alive())


@pytest.mark.parametrize("count", [3, 4, 12])
@pytest.mark.parametrize("seed", [*range(4), 7, *range(8, 4 + 4 * FACTOR)])
def test_slow_is_not_dead(count, seed):
    """A peer that stalls for seconds, again and again, is never called dead."""
    fleet = settled(count, seed)
    slow = name(1)
    for _ in range(12):
        fleet.stall(slow, fleet.rng.uniform(2, 9))
        for _ in range(15):
            fleet.run(1)
            assert State.DEAD not in fleet.views(slow)
    # nor does it call the others dead, whom it could not hear
    assert all(State.DEAD not in fleet.views(peer) for peer in fleet.cores)
    fleet.run(60)
    assert fleet.views(slow) == ALIVE


@pytest.mark.parametrize("seeds", LOSSY_SEEDS)
def test_lost_messages_alone_kill_nobody(seeds):
    """A fifth of all messages is lost: more than one call in three is in vain."""
    for seed in seeds:
        fleet = settled(10, seed)
        fleet.loss = 0.2
        for _ in range(600):
            fleet.run(1)
            dead = {peer: core.dead for peer, core in fleet.cores.items() if core.dead}
            assert not dead, (seed, fleet.now)


@pytest.mark.parametrize("count", [2, 3, 4, 10, 30])
def test_a_ghost_is_dead_within_the_bound_though_messages_are_lost(count):
    bound = CONFIG.ghost_bound_seconds(count)
    for seed in range(3 * FACTOR):
        fleet = settled(count, seed)
        fleet.loss = 0.2
        fleet.run(60 + fleet.rng.uniform(0, 20))
        ghost = name(count - 1)
        fleet.kill(ghost, noticed=False)
        fleet.run_until(lambda: fleet.views(ghost) == DEAD, bound)  # noqa: B023


def test_partition_and_heal():
    fleet = settled(6)
    left, right = {name(0), name(1), name(2)}, {name(3), name(4), name(5)}
    fleet.partition(left)
    bound = CONFIG.ghost_bound_seconds(6) * 2
    fleet.run_until(
        lambda: all(
            fleet.cores[one].state(other) is State.DEAD
            for one in left
            for other in right
        ),
        bound,
    )
    assert all(
        fleet.cores[one].state(other) is State.ALIVE
        for one in left
        for other in left - {one}
    )
    fleet.heal()
    # a connection is evidence: at once; what others still say is refuted in time
    assert all(fleet.views(peer) == ALIVE for peer in fleet.cores)
    for _ in range(60):
        fleet.run(1)
        assert all(State.DEAD not in fleet.views(peer) for peer in fleet.cores)
    assert all(fleet.views(peer) == ALIVE for peer in fleet.cores)


def test_healing_needs_no_connection_event():
    fleet = settled(4)
    fleet.partition({name(0)})
    fleet.run_until(lambda: fleet.views(name(0)) == DEAD, 300)
    fleet.cut = set()
    fleet.run_until(lambda: fleet.views(name(0)) == ALIVE, 400)
    fleet.run_until(
        lambda: all(fleet.views(peer) == ALIVE for peer in fleet.cores), 400
    )


def test_a_restart_is_alive_again():
    fleet = settled(4)
    fleet.kill(name(2))
    fleet.run_until(lambda: fleet.views(name(2)) == DEAD, 120)
    fleet.boot(name(2), incarnation=4096)
    fleet.run_until(lambda: fleet.views(name(2)) == ALIVE, 60)
    fleet.run(120)
    assert fleet.views(name(2)) == ALIVE


def test_a_newcomer_hears_who_is_absent():
    fleet = settled(6)
    fleet.kill(name(0))
    fleet.run_until(lambda: fleet.views(name(0)) == DEAD, 120)
    fleet.boot(name(9), incarnation=4096)
    newcomer = fleet.cores[name(9)]
    fleet.run_until(lambda: newcomer.state(name(0)) in (State.SUSPECT, State.DEAD), 15)
    fleet.run_until(lambda: newcomer.state(name(1)) is State.ALIVE, 15)
    fleet.run_until(lambda: newcomer.state(name(0)) is State.DEAD, 60)


def test_traffic_per_peer_does_not_grow_with_the_mesh():
    rates = {}
    for count in (5, 40):
        fleet = settled(count)
        fleet.run(120)  # the greetings are over
        fleet.bytes.clear()
        fleet.messages = 0
        fleet.run(600)
        rates[count] = sum(fleet.bytes.values()) / count / 600
    # four loads of others are passed on: no more in a larger mesh
    assert rates[40] <= rates[5] * 1.1
    assert rates[40] < 120  # B/s; ARCHITECTURE.md says 100


def test_messages_stay_small_when_everything_happens_at_once():
    fleet = settled(40)
    fleet.largest = 0
    for number in range(15):
        fleet.kill(name(number))
    fleet.run(300)
    assert fleet.largest < 4096
    assert all(fleet.views(peer) == ALIVE for peer in fleet.alive())
    assert all(fleet.views(name(n)) == DEAD for n in range(15))
