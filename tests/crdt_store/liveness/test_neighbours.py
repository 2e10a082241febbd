"""Each peer probes its neighbours alone; all believe the same of all."""

import pytest

from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.core import State
from tests.crdt_store.liveness.fleet import Fleet, name

CONFIG = LivenessConfig()
ALIVE, DEAD = {State.ALIVE}, {State.DEAD}


def settled(count, limit, seed=0):
    fleet = Fleet(count, seed=seed, limit=limit)
    fleet.run_until(lambda: everybody_alive(fleet), 120)
    return fleet


def everybody_alive(fleet):
    return all(fleet.views(peer) == ALIVE for peer in fleet.alive())


def test_all_are_alive_and_stay_so_though_few_are_probed():
    fleet = settled(40, 6)
    fleet.messages = 0
    for _ in range(60):
        fleet.run(5)
        assert everybody_alive(fleet)
    # a question and an answer per peer and period, as where all probe all
    assert fleet.messages / 40 / 300 < 0.45


@pytest.mark.parametrize(("count", "limit"), [(9, 4), (30, 4), (60, 8)])
@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_a_ghost_is_dead_everywhere_within_the_bound(count, limit, noticed, seed):
    fleet = settled(count, limit, seed)
    fleet.run(fleet.rng.uniform(0, 20))
    ghost = name(count - 1)
    fleet.kill(ghost, noticed=noticed)
    fleet.run_until(
        lambda: fleet.views(ghost) == DEAD, CONFIG.ghost_bound_seconds(count)
    )
    assert everybody_alive(fleet)


@pytest.mark.slow
def test_ghosts_among_two_hundred():
    fleet = settled(200, 48)
    ghosts = [name(3), name(99)]
    for ghost in ghosts:
        fleet.kill(ghost)
    took = fleet.run_until(
        lambda: all(fleet.views(ghost) == DEAD for ghost in ghosts),
        CONFIG.ghost_bound_seconds(200),
    )
    print(f"dead in 198 views after {took:.0f} s")
    assert everybody_alive(fleet)


def test_who_missed_the_news_of_a_death_hears_of_it_all_the_same():
    fleet = settled(30, 4)
    ghost, late = name(7), name(20)
    away = {peer for peer in fleet.cores if peer not in fleet.near_of(ghost)}
    late = min(away - {ghost, late})
    fleet.kill(ghost)
    fleet.run_until(lambda: fleet.views(ghost) == DEAD, 200)
    fleet.run(60)
    # as one that slept through all of it
    core = fleet.cores[late]
    core._beliefs.pardon([ghost])
    assert core.state(ghost) is State.ALIVE
    fleet.run_until(lambda: core.state(ghost) is State.DEAD, 200)
    assert everybody_alive(fleet)


@pytest.mark.parametrize("size", [1, 8, 15])
def test_islands_that_meet_again_believe_the_same(size):
    """Nobody tells them: each tries one of the lost now and then."""
    fleet = settled(30, 4)
    island = {name(number) for number in range(size)}
    rest = set(fleet.cores) - island
    fleet.partition(island)

    for _ in range(int(2 * CONFIG.ghost_bound_seconds(30))):
        fleet.run(1)
        fleet.settle_neighbours()
    assert all(fleet.cores[one].dead & rest for one in island)
    assert all(fleet.cores[one].dead >= island for one in rest)
    fleet.cut = set()
    took = fleet.run_until(lambda: everybody_alive(fleet), 400)
    print(f"all alive again {took:.0f} s after the heal")


def test_slow_is_not_dead():
    fleet = settled(20, 4)
    slow = name(1)
    for _ in range(10):
        fleet.stall(slow, fleet.rng.uniform(2, 9))
        for _ in range(15):
            fleet.run(1)
            assert State.DEAD not in fleet.views(slow)
    fleet.run(60)
    assert everybody_alive(fleet)


def test_a_newcomer_is_known_to_all_and_hears_who_is_absent():
    fleet = settled(20, 4)
    fleet.kill(name(0))
    fleet.run_until(lambda: fleet.views(name(0)) == DEAD, 200)
    fleet.boot(name(50), incarnation=4096)
    fleet.run_until(lambda: fleet.views(name(50)) == ALIVE, 120)
    newcomer = fleet.cores[name(50)]
    fleet.run_until(lambda: newcomer.state(name(0)) is State.DEAD, 120)
    fleet.run_until(lambda: everybody_alive(fleet), 60)
